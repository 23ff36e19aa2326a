"""What the operators of the graph mean: each is one function in plain torch.

Generated modules call these by the operator's name (`from .runtime import functional as F`).
Equation numbers are those of the DeepSeek-V3 Technical Report (arXiv 2412.19437). Unless a
docstring says otherwise, results have the dtype of the first operand, and sums and exponentials
are computed in float32 (in float64 for float64 operands).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from . import matmul, routing

IGNORED_LABEL = -100
"""Positions with this label count in no loss, as in torch and transformers."""

Mask = Callable[[Tensor, Tensor], Tensor]
"""Of positions of queries and keys, int64 of shapes that meet: which keys a query sees, bool."""

TINY = 1e-20
"""Keeps a sum of scores that all underflowed from dividing by zero, as transformers does."""


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, hidden] for int64 `tokens` [...]: [..., hidden]."""
    return torch_f.embedding(tokens, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` for x [..., in] and weight [out, in]: [..., out]. A bias is added apart."""
    return matmul.product(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`w x / sqrt(mean(x^2) + eps)` over the last dimension, weighted before the cast back."""
    exact = wide(x)
    return (exact * inverse_rms(exact, eps) * weight).to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last dimension, which stays with size 1."""
    # vector_norm reads x once and writes nothing of its size, as x.square().mean() would.
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return torch.rsqrt(square / x.shape[-1] + eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + y`, and `rms_norm` of it."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """`w (x - mean(x)) / sqrt(var(x) + eps) + b` over the last dimension (arXiv 1607.06450)."""
    exact = wide(x)
    normed = torch_f.layer_norm(exact, x.shape[-1:], eps=eps) * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`, elementwise."""
    return silu(gate) * up


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`, elementwise."""
    if matmul.is_batch_invariant():  # torch's rounds otherwise at the end of what a thread computes
        exact = wide(x)
        return (exact * _logistic(exact)).to(x.dtype)
    return torch_f.silu(x)


def _logistic(x: Tensor) -> Tensor:
    """`torch.sigmoid`, each element by the same operations at any position."""
    return 1 / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`, elementwise: the affinity of a token to an expert, eq. 15.

    In float64 and then rounded: libraries differ in the last bits of an exponential, and one bit
    can send a token to another expert. What is left of the difference survives the rounding to
    float32 about once in 10^8 elements.
    """
    exact = x.double()
    value = _logistic(exact) if matmul.is_batch_invariant() else torch.sigmoid(exact)
    return value.to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension; in float64 and then rounded, as `sigmoid`."""
    return torch.softmax(x.double(), dim=-1).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """`x P(x)`, elementwise, P the distribution function of N(0, 1) (arXiv 1606.08415)."""
    if matmul.is_batch_invariant():  # as for `silu`
        exact = wide(x)
        return (exact / 2 * (1 + torch.erf(exact * math.sqrt(0.5)))).to(x.dtype)
    return torch_f.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, elementwise."""
    if matmul.is_batch_invariant():
        exact = wide(x)
        inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact * exact * exact)
        return (exact / 2 * (1 + torch.tanh(inner))).to(x.dtype)
    return torch_f.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`, elementwise."""
    return torch.relu(x)


def relu_squared(x: Tensor) -> Tensor:
    """`max(x, 0)^2`, elementwise (arXiv 2109.08668)."""
    return torch.relu(x).square()


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, elementwise."""
    return torch.tanh(x)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, elementwise; from 40 on that is x, also in float64."""
    if matmul.is_batch_invariant():
        exact = wide(x)
        return torch.log1p(torch.exp(exact.clamp(max=40))).where(exact < 40, exact).to(x.dtype)
    return torch_f.softplus(x, threshold=40)


def exp(x: Tensor) -> Tensor:
    """e to the power of x, elementwise."""
    return torch.exp(x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm, elementwise."""
    return torch.log(x)


def sqrt(x: Tensor) -> Tensor:
    """Square root, elementwise."""
    return torch.sqrt(x)


def rope_table(
    position: Tensor,
    *,
    dim: int,
    theta: float,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that `rotate` needs, each float32 [..., dim / 2].

    `position` [...] counts tokens from 0. `factor` is YaRN's (arXiv 2309.00071, by parts);
    1 means plain RoPE. `original_max_position_embeddings` is the length, in tokens, that the model
    was first trained at; `beta_fast` and `beta_slow` are the rotations within it above which a
    frequency stays and below which it is divided by `factor`. `attention_factor` is YaRN's
    mscale / mscale_all_dim.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    frequency = 1.0 / theta**exponent
    if factor != 1.0:
        original = original_max_position_embeddings
        low = max(math.floor(_rotating_dim(beta_fast, dim, theta, original)), 0)
        high = min(math.ceil(_rotating_dim(beta_slow, dim, theta, original)), dim - 1)
        index = torch.arange(dim // 2, dtype=torch.float32, device=position.device)
        ramp = ((index - low) / ((high - low) or 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / factor * ramp
    angle = position.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos() * attention_factor, angle.sin() * attention_factor


def _rotating_dim(rotations: float, dim: int, theta: float, original: int) -> float:
    """The (fractional) pair that turns `rotations` times within `original` tokens."""
    return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [batch, seq, dim] or [batch, seq, heads, dim].

    Adjacent elements (2i, 2i + 1) form a pair, as in the published weights and the reference
    code, and stay where they are. Computed in float32, cast back.
    """
    # A pair is a complex number: one product in place instead of four and a copy, in a sixth of
    # the time.
    if matmul.is_batch_invariant():  # which rounds as its place in memory says
        return _rotate_pairs(x, cos, sin)
    turn = torch.complex(cos, sin)
    if x.dim() > turn.dim():
        turn = turn.unsqueeze(-2)
    out = x.to(wide_dtype(x), copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(out.unflatten(-1, (-1, 2))).mul_(turn)
    return out.to(x.dtype)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, each element by the same operations at any position."""
    if x.dim() > cos.dim():
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    even, odd = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of the pairs (i, i + dim / 2), as GPT-NeoX has them."""
    if x.dim() > cos.dim():
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = wide(x).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


def rotate_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of the last elements of each head of x [batch, seq, heads, d]; the rest stays."""
    before, last = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    return torch.cat([before, rotate(last, cos, sin)], -1)


def join_rotated(x: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head's part of keys x [batch, seq, heads, d], followed by `rotate` of the part that
    all heads share [batch, seq, r], eq. 4."""
    turned = rotate(shared, cos, sin).unsqueeze(-2).expand(-1, -1, x.shape[-2], -1)
    return torch.cat([x, turned], -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention, eq. 10: [batch, query, heads, v_dim].

    q [batch, query, heads, dim], k [batch, key, kv_heads, dim], v [batch, key, kv_heads, v_dim].
    The last query sees every key, so a longer `k` continues a cached sequence. With fewer
    kv_heads than heads, each serves heads / kv_heads neighbours. `scale` multiplies `q . k`.
    `window`, `mask` and `softcap` are those of `visible` and `capped`; keys count from 0.
    `selected` int64 [batch, query, n] are the keys that a query may see, -1 for none; `sinks`
    [heads] are scores without a value, whose exponentials are in the sum that each head divides by.
    Raises ValueError when there are more queries than keys.
    """
    if selected is not None and q.shape[1] == 1:
        counting, (k, v) = read_selected(selected, k, v)
        return attend(q, k, v, counting, scale, softcap=softcap, sinks=sinks)
    first = first_key(q.shape[1], k.shape[1], window)
    seen = attention_mask(q.shape[1], k.shape[1], q.device, window, mask, selected)
    causal = seen is None and q.shape[1] > 1
    return attend(q, k[:, first:], v[:, first:], seen, scale, causal, softcap, sinks)


def read_selected(selected: Tensor, *parts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The selected entries of parts [batch, key, ..] alone, for one query of each sequence: [batch,
    n, ..] each; and which of them count, bool [batch, 1, 1, n], each once."""
    device, keys = selected.device, parts[0].shape[1]
    row = torch.arange(len(selected), device=device).unsqueeze(1)
    place = selected[:, 0].where(selected[:, 0] >= 0, keys)
    number = torch.arange(place.shape[1], device=device).expand_as(place)
    one = number.new_zeros(len(place), keys + 1).scatter_(1, place, number).gather(1, place)
    seen = (place < keys) & (one == number)
    return seen[:, None, None], [part[row, place.clamp(max=keys - 1)] for part in parts]


def first_key(queries: int, keys: int, window: int | None) -> int:
    """How many keys at the beginning are in no query's window."""
    return 0 if window is None else max(0, keys - queries - window + 1)


def attention_mask(
    queries: int,
    keys: int,
    device: torch.device,
    window: int | None,
    mask: Mask | None,
    selected: Tensor | None = None,
) -> Tensor | None:
    """Which keys from `first_key` on the last `queries` of `keys` tokens see: bool [1, 1, query,
    key], or, of `selected` ones, [batch, 1, query, key]. None where it is each that does not come
    later.

    Raises ValueError when there are more queries than keys.
    """
    if queries > keys:
        raise ValueError(f"attention got {queries} queries but only {keys} keys")
    whole = queries == keys and (window is None or window >= keys)
    if mask is None and selected is None and (queries == 1 or whole):
        return None  # of one query, `first_key` says all
    first = first_key(queries, keys, window)
    place = torch.arange(keys, device=device)
    seen = visible(place[keys - queries :].unsqueeze(1), place[first:], window, mask)[None, None]
    return seen if selected is None else seen & among(selected, keys)[:, None, :, first:]


def among(selected: Tensor, keys: int) -> Tensor:
    """Which of `keys` keys `selected` int64 [..., n] lists, -1 being none: bool [..., keys]."""
    found = selected.new_zeros(*selected.shape[:-1], keys + 1, dtype=torch.bool)
    return found.scatter_(-1, selected.where(selected >= 0, keys), True)[..., :keys]


def lightning_indexer(q: Tensor, k: Tensor, weight: Tensor, topk: int) -> Tensor:
    """The keys that each query selects: int64 [batch, query, topk], best first.

    Those with the highest of `index_scores`, of which shapes are; of equal ones the first. The last
    query may select every key; where there are fewer than `topk`, -1 fills up. DeepSeek-V3.2
    report, section 2.1.
    """
    queries, keys = q.shape[1], k.shape[1]
    with torch.no_grad():
        score = index_scores(q, k, weight)
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        return best_keys(score.masked_fill(later.triu(keys - queries + 1), -math.inf), topk)


def index_scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """`sum_h weight_h relu(q_h . k)`, DeepSeek-V3.2 report, eq. 1, in float32: [batch, query, key].

    q [batch, query, heads, d], k [batch, key, d], weight [batch, query, heads].
    """
    keys, total = wide(k).transpose(1, 2), None
    for head in range(q.shape[2]):  # the scores of all heads at once may be too many
        part = torch.relu(wide(q[:, :, head]) @ keys) * wide(weight[:, :, head, None])
        total = part if total is None else total + part
    assert total is not None
    return total


def best_keys(score: Tensor, topk: int) -> Tensor:
    """Indices [..., topk] of the largest scores [..., key], best first; -1 for those of -inf, and
    where there are fewer."""
    value, index = score.sort(dim=-1, descending=True, stable=True)
    index = index.masked_fill(value == -math.inf, -1)[..., :topk]
    return torch_f.pad(index, (0, topk - index.shape[-1]), value=-1)


def indexer_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weight: Tensor,
    selected: Tensor,
    scale: float,
) -> Tensor:
    """The mean over queries of KL(p || softmax(I)) over the selected keys: a float32 scalar.

    I are `index_scores`; p the probabilities of attention, whose q, k and `scale` these are, summed
    over heads and divided by their number, without gradients. DeepSeek-V3.2 report, eq. 4. 0 for no
    tokens, which an MTP module may have.
    """
    seen = attention_mask(q.shape[1], k.shape[1], q.device, None, None, selected)
    assert seen is not None
    score = index_scores(index_q, index_k, weight).masked_fill(~seen[:, 0], -math.inf)
    if score.numel() == 0:
        return index_q.sum() * 0
    with torch.no_grad():
        target = mean_probability(q, k, seen[:, 0], scale)
    gap = target.clamp(min=TINY).log() - torch.log_softmax(score, -1)
    return (target * gap.masked_fill(~seen[:, 0], 0)).sum(-1).mean()


def mean_probability(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The mean over heads of softmax(scale q k^T) over the keys `seen` [batch, query, key]."""
    total, shared = torch.zeros(seen.shape, dtype=wide_dtype(q), device=q.device), k.shape[2]
    for head in range(q.shape[2]):
        keys = wide(k[:, :, head * shared // q.shape[2]]).transpose(1, 2)
        score = wide(q[:, :, head]) @ keys * scale
        total += score.masked_fill(~seen, -math.inf).softmax(-1)
    return total / q.shape[2]


def visible(query: Tensor, key: Tensor, window: int | None, mask: Mask | None) -> Tensor:
    """Which keys queries see, by positions of shapes that meet: bool.

    Keys that do not come later; of these itself and the `window - 1` before it; of these those that
    `mask` holds for.
    """
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if mask is not None:
        seen = seen & mask(query, key)
    return seen


def capped(score: Tensor, softcap: float | None) -> Tensor:
    """`softcap tanh(score / softcap)`: scores between its negative and itself (Gemma 2, arXiv
    2408.00118, section 2)."""
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the keys `seen`, bool, of a shape that meets [batch, heads, query, key].

    Without `seen` to all keys, or, if `causal`, to those that do not come later.
    """
    if softcap is not None or sinks is not None:
        return _attend_scores(q, k, v, seen, scale, causal, softcap, sinks)
    width = v.shape[-1]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = equally_wide(q, k, v)
    out = torch_f.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)[..., :width]


def _attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend`, which torch has no kernel for: all scores are in memory, in float32."""
    queries, keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    groups = q.shape[2] // kv_heads
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    # Queries that share a head of keys, concatenated: [batch, kv_heads, g * query, dim].
    grouped = wide(q).unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    score = grouped @ wide(k).permute(0, 2, 3, 1) * scale
    score = capped(score, softcap).unflatten(2, (groups, queries)).flatten(1, 2)
    if seen is not None:
        score = score.masked_fill(~seen, -math.inf)
    share = probabilities(score, None if sinks is None else sinks[:, None, None])
    share = share.unflatten(1, (kv_heads, groups)).flatten(2, 3)
    out: Tensor = (share @ wide(v).transpose(1, 2)).unflatten(2, (groups, queries))
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype)


def probabilities(score: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; `sinks`, of size 1 there, are in the sum of exponentials, as
    scores that no probability is given out for (gpt-oss, arXiv 2508.10925)."""
    if sinks is None:
        return score.softmax(-1)
    sink = sinks.to(score.dtype).expand(*score.shape[:-1], 1)
    return torch.cat([score, sink], -1).softmax(-1)[..., :-1]


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    scale: float,
    window: int | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention` of as many queries as keys within documents; `position` counts from 0 in each,
    `selected` keys from the beginning of the sequence."""
    seen = document_mask(position, window, mask, selected)
    return attend(q, k, v, seen, scale, softcap=softcap, sinks=sinks)


def document_mask(
    position: Tensor,
    window: int | None = None,
    mask: Mask | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """The mask of documents, bool [batch, 1, query, key]: causal, within each document.

    `position` [batch, seq] counts from 0 in each document, so the index of a token minus its
    position is the start of its document.
    """
    start = torch.arange(position.shape[1], device=position.device) - position
    seen = (start.unsqueeze(2) == start.unsqueeze(1)).tril()
    if window is not None or mask is not None:
        seen = seen & visible(position.unsqueeze(2), position.unsqueeze(1), window, mask)
    if selected is not None:
        seen = seen & among(selected, position.shape[1])
    return seen.unsqueeze(1)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """`attention` of packed sequences: [token, heads, v_dim].

    q [token, heads, dim], k [key, kv_heads, dim], v [key, kv_heads, v_dim]. Sequence i has the
    tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1], int32 [sequences + 1], and likewise the keys of
    `cu_seqlens_k`: at least as many, and at most `max_seqlen`, which kernels need. Tokens after the
    last sequence get zeros.
    """
    seen, none = varlen_mask(len(q), len(k), cu_seqlens_q, cu_seqlens_k)
    out = attend(q[None], k[None], v[None], seen, scale)[0]
    return out.masked_fill(none[:, None, None], 0)


def varlen_mask(
    queries: int, keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """The mask of packed sequences, bool [queries, keys], and which queries are in none."""
    sequences = len(cu_seqlens_q) - 1
    of, left = [], []  # the sequence of each token, and how far its end is
    for tokens, cu_seqlens in ((queries, cu_seqlens_q), (keys, cu_seqlens_k)):
        place = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        of.append(torch.bucketize(place, cu_seqlens, right=True) - 1)
        left.append(cu_seqlens[(of[-1] + 1).clamp(max=sequences)] - place)
    seen = (of[0].unsqueeze(1) == of[1]) & (left[0].unsqueeze(1) <= left[1])
    return seen, of[0] == sequences


def equally_wide(*parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors [batch, seq, heads, ..] as [batch, heads, seq, width], padded with zeros alike.

    Torch's fast kernels want one width for q, k and v; a zero adds nothing to a product.
    """
    width = max(t.shape[-1] for t in parts)
    padded = (torch_f.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in parts)
    return tuple(t.transpose(1, 2) for t in padded)


def topk_groups(
    score: Tensor,
    bias: Tensor | None,
    *,
    n_group: int,
    topk_group: int,
    k: int,
    group_score: Literal["top2_sum", "max"],
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Node-limited routing, eq. 12-16: int64 expert indices and their weights, each [..., k].

    score [..., experts], bias [experts] or None. The biased score only selects: the best
    `topk_group` of `n_group` runs of neighbouring experts, by the sum of their two best experts
    or by the best one, and then the `k` best experts in those. Experts of other groups count as
    -inf, so a negative bias cannot let them back in. Weights are the unbiased scores of the
    chosen, divided by their sum if `normalize`, times `scale`, in float64 and then rounded to the
    dtype of `score`; they keep its gradient. Of equal scores the lowest index wins. Best comes
    first.

    Raises ValueError when `k` experts do not fit into the groups.
    """
    experts = score.shape[-1]
    if experts % n_group or k > experts // n_group * topk_group:
        raise ValueError(f"{k} of {experts} experts do not fit in {topk_group} of {n_group} groups")
    choice = score if bias is None else score + bias
    if topk_group < n_group:
        grouped = choice.unflatten(-1, (n_group, -1))
        best = min(2, grouped.shape[-1]) if group_score == "top2_sum" else 1
        group = _best(grouped.topk(best, dim=-1).values.sum(-1), topk_group)
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, group, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)
    index = _best(choice, k)
    weight = score.gather(-1, index).double()
    if normalize:
        weight = weight / (weight.sum(-1, keepdim=True) + TINY)
    return index, (weight * scale).to(score.dtype)


Scoring = Literal["sigmoid", "softmax"]


def gate(
    x: Tensor, bias: Tensor | None, *, scoring: Scoring, **choice: Any
) -> tuple[Tensor, Tensor]:
    """`topk_groups` of the affinities that `scoring` makes of x [..., experts].

    `choice` is what `topk_groups` takes by name.
    """
    topk_indices, weight, _ = gate_saving(x, bias, scoring=scoring, **choice)
    return topk_indices, weight


def gate_saving(
    x: Tensor, bias: Tensor | None, *, scoring: Scoring, **choice: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate`, and the affinities [..., experts]."""
    affinity = sigmoid(x) if scoring == "sigmoid" else softmax(x)
    return *topk_groups(affinity, bias, **choice), affinity


_SORTED = 1024
"""Up to so many scores at once, one call that sorts them all costs less than several calls."""


def _best(score: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the largest, best first; of equals the lowest index.

    torch.topk leaves the order of equals open; argmax does not, and is as fast for such small k.
    Sorting takes twice the time for many tokens, and a fifth for one (64 experts, k = 8).
    """
    if score.numel() <= _SORTED:
        return score.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    left, chosen = score.detach().clone(), []
    for _ in range(k):
        chosen.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, chosen[-1], -math.inf)
    return torch.cat(chosen, -1)


Chosen = tuple[Tensor, Tensor]
"""Tokens that one expert works on: their indices in the flattened batch, and which of their k
choices it was; int64 [n] each."""


def dispatch(index: Tensor, experts: int) -> list[Chosen]:
    """For each expert the tokens that chose it, in order; no token is dropped.

    index [..., k] as `topk_groups` gives it; from `experts` on none are listed. Raises ValueError
    where experts are on several ranks.
    """
    if routing.current() is not None:
        raise ValueError("experts that are computed one by one cannot be spread over ranks")
    flat = index.flatten()
    sort_indices = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    token = torch.div(sort_indices, index.shape[-1], rounding_mode="floor")
    choice = sort_indices % index.shape[-1]
    return list(zip(token.split(counts), choice.split(counts), strict=True))[:experts]


def gather_tokens(x: Tensor, chosen: Chosen) -> Tensor:
    """The chosen tokens of x [..., hidden]: [n, hidden]."""
    return x.flatten(0, -2)[chosen[0]]


def add_tokens(y: Tensor, chosen: Chosen, out: Tensor, weight: Tensor) -> None:
    """Adds an expert's results `out` [n, hidden], times their weights, to y [..., hidden], eq. 12.

    weight [..., k] is cast to the dtype of `out` first, as the reference does.
    """
    token, choice = chosen
    factor = weight.flatten(0, -2)[token, choice].to(out.dtype)
    y.view(-1, y.shape[-1]).index_add_(0, token, out * factor.unsqueeze(-1))


def positions(tokens: Tensor) -> Tensor:
    """0, 1, 2, .. for each sequence of tokens [batch, seq]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def sequence_balance_loss(score: Tensor, k: int) -> Tensor:
    """Sequence-wise balance loss without its factor alpha, eq. 17-20: a scalar, 1 when balanced.

    score [batch, seq, experts] are affinities as the gate gives them. Experts are counted by the
    `k` best raw scores, without bias or group limit, as the equations are printed. The mean over
    the sequences of the batch; 0 for sequences without a token, which an MTP module has where they
    are not longer than its depth.
    """
    experts = score.shape[-1]
    if score.shape[-2] == 0:
        return score.sum()
    frequency = chosen(score, k).mean(-2) * (experts / k)
    probability = (score / (score.sum(-1, keepdim=True) + TINY)).mean(-2)
    return (frequency * probability).sum(-1).mean()


def chosen(score: Tensor, k: int) -> Tensor:
    """1 for each of the k best of the last dimension, 0 for the others."""
    return torch.zeros_like(score).scatter(-1, _best(score, k), 1.0)


def expert_load(index: Tensor, n: int) -> Tensor:
    """How many tokens chose each of `n` experts: int64 [n], for indices of any shape."""
    chosen = index.flatten()
    return torch.zeros(n, dtype=torch.int64, device=index.device).scatter_add(
        0, chosen, torch.ones_like(chosen)
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log likelihood over labels [...] that are not -100: a float32 scalar.

    logits [..., vocab]. A sum, because each caller knows what to divide by: eq. 24 divides the
    loss of an MTP depth by the length of the whole sequence.
    """
    return torch_f.cross_entropy(
        wide(logits).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def count_labels(labels: Tensor) -> Tensor:
    """How many labels are not -100, but at least 1, as a divisor: a float32 scalar."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1).float()


def wide(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays, so that gradients can be checked in it."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over elements of `x` are taken."""
    return torch.promote_types(x.dtype, torch.float32)


def permute(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of x [..., hidden] once for each expert in index [..., k], sorted by expert.

    Returns the rows [slots, hidden], the offsets at which each expert's rows end (int32 [experts]),
    and the place in the flattened `index` of each row (int64 [slots]). No token is dropped.
    Where experts are on several ranks, rows are those of all ranks for this one's, and places those
    of this rank's tokens.
    """
    return _permuted(_sorted, x, index, experts)


def permute_local(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same where not all have rows: -1 in `index` is an expert of another rank, and experts
    from `experts` on give back their tokens (`identity_weight`)."""
    return _permuted(_sorted_local, x, index, experts)


def _permuted(
    order: Callable[[Tensor, int], tuple[Tensor, Tensor]], x: Tensor, index: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`permute`; `order` gives counts of experts, and places in the flattened `index`."""
    if (ranks := routing.current()) is not None:
        (rows,), offs, sort_indices = ranks.send((x,), index)
        return rows, offs, sort_indices
    counts, sort_indices = order(index.flatten(), experts)
    token = torch.div(sort_indices, index.shape[-1], rounding_mode="floor")
    rows = x.flatten(0, -2).index_select(0, token)
    return rows, counts.cumsum(0).to(torch.int32), sort_indices


def _sorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    # Not `bincount`, for which the host would wait for a GPU.
    return expert_load(index, experts), index.argsort(stable=True)


def _sorted_local(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(index + 1, minlength=experts + 1)
    before, here = int(counts[0]), counts[1 : experts + 1]
    return here, index.argsort(stable=True)[before : before + int(here.sum())]


def identity_weight(index: Tensor, weight: Tensor, count: int) -> Tensor:
    """The sum of each token's weights [..., k] of experts from `count` on: [..., 1]."""
    return torch.where(index >= count, weight, 0).sum(-1, keepdim=True)


def grouped_linear(x: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
    """`x W_e^T` for the rows of each expert e: x [slots, in], weight [experts, out, in]."""
    return matmul.grouped_product(x, offs, weight)


def grouped_parameter(x: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
    """Row e of weight [experts, n] for each row of expert e in x [slots, ..]: [slots, n]."""
    return weight.repeat_interleave(rows_of(offs), dim=0, output_size=len(x))


def rows_of(offs: Tensor) -> Tensor:
    """How many rows each expert has, from the offsets at which they end: int64 [experts]."""
    return torch.diff(offs, prepend=offs.new_zeros(1)).to(torch.int64)


def unpermute(y: Tensor, sort_indices: Tensor, weight: Tensor) -> Tensor:
    """Rows y [slots, hidden] back at their tokens, times weight [..., k], summed, eq. 12.

    The sum runs in the order of each token's choices, in any batch: [..., hidden].
    """
    if (ranks := routing.current()) is not None:
        y = ranks.give_back(y)
    return sum_choices(y, sort_indices, weight.flatten(0, -2).to(y.dtype)).view(
        *weight.shape[:-1], y.shape[-1]
    )


def sum_choices(y: Tensor, sort_indices: Tensor, weight: Tensor) -> Tensor:
    """Rows y [slots, hidden] times weight [tokens, k], summed for each token: [tokens, hidden].

    `sort_indices` are those of `permute`. As a bag of embeddings this is one pass over the rows
    (8192 x 512: 0.9 ms on one core, against 12.7 for look-up, product and sum). In bfloat16 the bag
    rounds halves up; the sum of float32 is rounded to nearest, ties to even, as kernels do.
    """
    rows, factor = wide(y), wide(weight)
    place = sort_indices.new_full((weight.numel(),), len(rows)).scatter_(
        0, sort_indices, torch.arange(len(sort_indices), device=y.device)
    )
    if len(rows) < weight.numel():  # of other choices, other ranks have the rows
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
    bag = torch_f.embedding_bag(
        place.view(weight.shape), rows, mode="sum", per_sample_weights=factor
    )
    return bag.to(y.dtype)


def head_linear(x: Tensor, weight: Tensor, rows: tuple[int, int], *, transposed: bool) -> Tensor:
    """Each head's rows of weight [heads * n, in] times x [batch, seq, heads, d].

    `rows` are the first and the one after the last of each head's n rows. `transposed` multiplies
    by their transpose: [batch, seq, heads, in] instead of [batch, seq, heads, rows].
    """
    part = weight.unflatten(0, (x.shape[-2], -1))[:, rows[0] : rows[1]]
    if not transposed:
        part = part.transpose(1, 2)
    # By hand what einsum would do: a decoding step is as long as its calls are many.
    flat = x.flatten(0, 1)
    if matmul.is_batch_invariant():
        out = matmul.in_float32(partial(matmul.by_rows, _by_head), flat, part)
    else:
        out = matmul.in_float32(_by_head, flat, part)
    return out.view(*x.shape[:3], -1)


def _by_head(x: Tensor, part: Tensor) -> Tensor:
    """x [n, heads, d] times each head's matrix [heads, d, m]: [n, heads, m]."""
    return torch.bmm(x.transpose(0, 1), part).transpose(0, 1)


_WIDENED = 2**18
"""Up to so many elements in the latents, the CPU attends in float32: for bfloat16, oneDNN makes a
kernel for each new length of the context, which takes longer than all the rest of a layer."""


def latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    scale: float,
    window: int | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
    selected: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of all heads to the same latents, which are keys and values at once.

    q_latent [batch, query, heads, c], q_rope [batch, query, heads, r], c_kv [batch, key, c],
    k_rope [batch, key, r]: [batch, query, heads, c]. The last query sees every key that `window`,
    `mask` and `selected` let it see, as in `attention`.
    """
    queries, keys = q_latent.shape[1], c_kv.shape[1]
    heads, dtype = q_latent.shape[2], c_kv.dtype
    seen: Tensor | None
    if selected is not None and queries == 1:
        seen, (c_kv, k_rope) = read_selected(selected, c_kv, k_rope)
    else:
        first = first_key(queries, keys, window)
        seen = attention_mask(queries, keys, c_kv.device, window, mask, selected)
        c_kv, k_rope = c_kv[:, first:], k_rope[:, first:]
    if c_kv.numel() <= _WIDENED and c_kv.device.type == "cpu":
        q_latent, q_rope, c_kv, k_rope = (wide(t) for t in (q_latent, q_rope, c_kv, k_rope))
    score = matmul.bmm(q_rope.flatten(1, 2), k_rope.transpose(1, 2))
    score = matmul.in_float32(torch.baddbmm, score, q_latent.flatten(1, 2), c_kv.transpose(1, 2))
    score = capped(wide(score) * scale, softcap)
    if seen is None and queries > 1:
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=score.device).tril()
    if seen is not None:
        score = score.masked_fill(~seen[:, 0].repeat_interleave(heads, 1), -math.inf)
    share = probabilities(score, None if sinks is None else sinks.repeat(queries).unsqueeze(-1))
    return matmul.bmm(share.to(c_kv.dtype), c_kv).view(q_latent.shape).to(dtype)


def paged_latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """`latent_attention` to latents in pages, of sequences that differ in length.

    c_kv [pages, page, c], k_rope [pages, page, r]; table int32 [batch, n] lists the pages of each
    sequence, lengths int32 [batch] its tokens, with those of the queries. What lies beyond the
    lengths, in table and pages, does not count. A query that sees no key gives zeros.
    """
    page, queries = c_kv.shape[1], q_latent.shape[1]
    place = torch.arange(table.shape[1] * page, device=table.device)
    there = place < lengths.unsqueeze(-1)
    rows = table.where(there[:, ::page], 0)
    latent, turned = (
        wide(x)[rows].flatten(1, 2).masked_fill(~there.unsqueeze(-1), 0) for x in (c_kv, k_rope)
    )
    score = torch.einsum("bqhc,bkc->bqhk", wide(q_latent), latent)
    score = (score + torch.einsum("bqhr,bkr->bqhk", wide(q_rope), turned)) * scale
    query = torch.arange(queries, device=table.device)
    last = (lengths.unsqueeze(-1) - queries + query)[..., None, None]
    share = score.masked_fill(place > last, -math.inf).softmax(-1).masked_fill(last < 0, 0)
    return torch.einsum("bqhk,bkc->bqhc", share, latent).to(q_latent.dtype)
