"""A user's file: the functions that externs in tests name. Builds hold a copy of it."""

import torch


def squash(x, beta, *, power=2):
    """|tanh(beta x)|^power, elementwise."""
    return torch.tanh(beta * x).abs() ** power


def weigh(x, y, limit):
    """x tanh(y / limit), with y of one number less in each row: any shape will do."""
    return x[..., 1:] * torch.tanh(y / limit), x.argmax(-1)


def weigh_grad(d, x, y, limit):
    t = torch.tanh(y / limit)
    dx = torch.nn.functional.pad(d * t, (1, 0))
    return dx, d * x[..., 1:] * (1 - t * t) / limit


def differential(q, k, v, subtracted):
    """Differential attention (arXiv 2410.05258): two softmaxes, one less a share of the other."""
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)

    def attend(q, k):
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        queries, keys = score.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        return score.masked_fill(later, -torch.inf).softmax(-1)

    weight = attend(q1, k1) - subtracted * attend(q2, k2)
    return torch.einsum("bhqk,bkhd->bqhd", weight, v)
