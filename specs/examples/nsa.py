"""Native sparse attention (arXiv 2502.11089) in plain torch: three ways to look back, and gates."""

import torch
from torch import Tensor


def nsa(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, block: int, top: int, window: int
) -> Tensor:
    """Gated sum of attention to compressed blocks, to the best blocks, and to the last tokens.

    q [batch, query, heads, dim]; k [batch, key, groups, dim] and v of all tokens so far, of which
    the last belongs to the last query; gates [batch, query, heads, 3]. Blocks are of `block`
    tokens, compressed to their means; a query selects the `top` blocks that its group's heads look
    at most, its own among them (equations 7 to 10, without overlap of blocks).
    """
    queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    place = torch.arange(keys, device=q.device)
    at = place[keys - queries :, None]  # of each query
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[3]) * q.shape[-1] ** -0.5

    whole = keys // block
    mean_k, mean_v = (
        x[:, : whole * block].reshape(x.shape[0], whole, block, *x.shape[2:]).mean(2)
        for x in (k, v)
    )
    ends = (torch.arange(whole, device=q.device) + 1) * block - 1
    probability, of_blocks = attend(q, mean_k, mean_v, (ends <= at)[None, None, None])

    count = -(-keys // block)
    looked_at = probability.detach().sum(2)  # by the heads of a group
    importance = looked_at.new_zeros(*looked_at.shape[:3], count)
    importance[..., :whole] = looked_at
    importance.scatter_(-1, (at // block).expand(*importance.shape[:3], 1), torch.inf)
    best = torch.zeros_like(importance, dtype=torch.bool)
    best.scatter_(-1, importance.topk(min(top, count)).indices, True)
    seen = best[..., place // block] & (place <= at)
    _, of_best = attend(q, k, v, seen[:, :, None])

    near = (place <= at) & (place > at - window)
    _, of_near = attend(q, k, v, near[None, None, None])
    parts = torch.stack([of_blocks, of_best, of_near], -1).flatten(2, 3)
    return (parts * gates.unsqueeze(-2)).sum(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [batch, groups, heads of each, query, key], 0 where nothing is seen, and what
    they make of the values."""
    score = torch.einsum("bqgrd,bkgd->bgrqk", q, k)
    score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
    probability = score.softmax(-1) * seen
    return probability, torch.einsum("bgrqk,bkge->bqgre", probability, v)
