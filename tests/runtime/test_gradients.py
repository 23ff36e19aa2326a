"""Derivatives that take one way or another by dtype and size: all give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import functional as F
from runtime import gradients as G


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def attended(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, with two heads of keys for four of queries, and a gradient of the result."""
    q, k, v = random(2, tokens, 4, 24), random(2, tokens, 2, 24, seed=1), random(2, tokens, 2, 16)
    return [t.to(dtype) for t in (q, k, v, random(2, tokens, 4, 16, seed=3))]


LENGTHS = pytest.mark.parametrize("tokens", [17, G.SHORT + 1])
TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16 keeps 8 bits, and probabilities are rounded to it before they are multiplied.
    [(torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-9)],
)


@LENGTHS
@TOLERANCES
def test_gradients_of_attention(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """Against autograd in float64."""
    q, k, v, d = attended(tokens, dtype)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    score = torch.einsum("bihd,bjhd->bhij", exact[0], exact[1].repeat_interleave(2, 2)) * 0.3
    score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), exact[2].repeat_interleave(2, 2))
    expected = torch.autograd.grad(y, exact, d.double())
    with torch.no_grad():
        o, lse = G.attention_saving(q, k, v, 0.3)
        found = G.attention_grad(d, q, k, v, o, lse, 0.3)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


SCORES: list[dict[str, Any]] = [
    {"window": 6},
    {"window": 300},
    {"softcap": 0.4},
    {"mask": lambda q, k: (q // 5 == k // 5) | (k < 3), "softcap": 2.0, "window": 9},
]


@LENGTHS
@TOLERANCES
@pytest.mark.parametrize("scores", SCORES)
def test_gradients_of_windows_masks_and_capped_scores(
    tokens: int, dtype: torch.dtype, tolerance: float, scores: dict[str, Any]
) -> None:
    """Against autograd in float64; of documents, too, all of which are as long as the sequence."""
    q, k, v, d = attended(tokens, dtype)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    score = torch.einsum("bihd,bjhd->bhij", exact[0], exact[1].repeat_interleave(2, 2)) * 0.3
    if cap := scores.get("softcap"):
        score = cap * torch.tanh(score / cap)
    i, j = torch.arange(tokens).unsqueeze(1), torch.arange(tokens)
    seen = (j <= i) & (i - j < scores.get("window", tokens))
    if mask := scores.get("mask"):
        seen &= mask(i, j)
    score = score.masked_fill(~seen, -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), exact[2].repeat_interleave(2, 2))
    expected = [y.detach(), *torch.autograd.grad(y, exact, d.double())]
    position = torch.arange(tokens).expand(2, -1)
    with torch.no_grad():
        o, lse = G.attention_saving(q, k, v, 0.3, **scores)
        plain = [F.attention(q, k, v, 0.3, **scores)]
        plain += G.attention_grad(d, q, k, v, o, lse, 0.3, **scores)
        o, lse = G.document_attention_saving(q, k, v, position, 0.3, **scores)
        documents = [F.document_attention(q, k, v, position, 0.3, **scores)]
        documents += G.document_attention_grad(d, q, k, v, position, o, lse, 0.3, **scores)
    for found in (plain, documents):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype and one.shape == other.shape
            assert (one.double() - other).norm() <= tolerance * other.norm()


@LENGTHS
@TOLERANCES
def test_documents_attend_as_each_alone(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """Results, log-sum-exp and gradients."""
    parts = attended(tokens, dtype)
    ends = [[5, 6, tokens], [1, 12, tokens]]
    position = torch.empty(2, tokens, dtype=torch.int64)
    alone: list[list[Tensor]] = []
    with torch.no_grad():
        for row, cuts in enumerate(ends):
            for start, end in zip([0, *cuts], cuts, strict=False):
                position[row, start:end] = torch.arange(end - start)
                q, k, v, d = (t[row : row + 1, start:end] for t in parts)
                saved = G.attention_saving(q, k, v, 0.3)
                alone.append([*saved, *G.attention_grad(d, q, k, v, *saved, 0.3)])
        q, k, v, d = parts
        saved = G.document_attention_saving(q, k, v, position, 0.3)
        found = [*saved, *G.document_attention_grad(d, q, k, v, position, *saved, 0.3)]
        assert torch.equal(F.document_attention(q, k, v, position, 0.3), saved[0])
    for i, one in enumerate(found):
        expected = torch.cat([document[i] for document in alone], 1).view(one.shape)
        assert (one - expected).norm() <= tolerance * expected.norm()


def test_rows_may_be_one_tensor_of_one_dimension() -> None:
    """As a free parameter that a product or a norm reads."""
    x, d, weight = torch.randn(8), torch.randn(8), torch.randn(8)
    assert torch.equal(G.linear_weight_grad(d, x), torch.outer(d, x))
    for grad in (G.rms_norm_grad, G.layer_norm_grad):
        dx, *_ = grad(d, x, weight, 1e-5)
        assert torch.equal(dx, grad(d[None], x[None], weight, 1e-5)[0][0])
