"""Rows for some experts: others are on other ranks, `-1` in the index, or give back tokens."""

from __future__ import annotations

import pytest
import torch

from runtime import fp8
from runtime import functional as F
from runtime import gradients as G

EXPERTS, WIDTH = 4, 5


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("first", [0, 2, 9])
def test_rows_of_all_ranks_are_those_of_one(tokens: int, first: int) -> None:
    """Of the experts `first` and behind; 9: this rank has none, and nothing arrives for it."""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)] or [torch.empty(0, 2)])
    index, weight = index.long().view(tokens, 2), torch.rand(tokens, 2)
    local = torch.where(index >= first, index - first, -1)
    rows, offs, order = F.permute_local(x, torch.where(local == 3, 7, local), EXPERTS)
    local = torch.where(local == 3, -1, local)  # no rows, like that of another rank
    assert len(rows) == int((local >= 0).sum()) == int(offs[-1])
    expected = torch.zeros(tokens, WIDTH)
    for token in range(tokens):
        for choice in range(2):
            if local[token, choice] >= 0:
                expected[token] += weight[token, choice] * (local[token, choice] + 1) * x[token]
    scale = torch.repeat_interleave(torch.arange(1, EXPERTS + 1), offs.diff(prepend=offs[:1] * 0))
    y = rows * scale.unsqueeze(-1)
    torch.testing.assert_close(F.unpermute(y, order, weight), expected)
    d_y, d_weight = G.unpermute_grad(torch.ones(tokens, WIDTH), y.clone(), order, weight)
    assert not d_weight[local < 0].any() and len(d_y) == len(rows)
    counted = (local >= 0).sum(-1, keepdim=True).expand(tokens, WIDTH).float()
    torch.testing.assert_close(G.permute_grad(torch.ones_like(rows), order, local), counted)


def test_experts_that_give_back_tokens_have_the_rest_of_the_weights() -> None:
    index, weight = torch.tensor([[[1, 5], [4, 6]]]), torch.tensor([[[0.25, 0.5], [0.5, 0.125]]])
    assert F.identity_weight(index, weight, EXPERTS).tolist() == [[[0.5], [0.625]]]
    rows, scales, offs, order = fp8.permute_quantized_local(
        torch.arange(2.0).view(1, 2, 1), torch.arange(2.0).view(1, 2, 1), index, EXPERTS
    )
    assert (rows.tolist(), scales.tolist()) == ([[0.0]], [[0.0]])
    assert (offs.tolist(), order.tolist()) == ([0, 1, 1, 1], [0])
    assert [len(tokens) for tokens, _ in F.dispatch(index, EXPERTS)] == [0, 1, 0, 0]


def test_without_others_it_is_permute() -> None:
    index, x = torch.tensor([[1, 0], [2, 1]]), torch.randn(2, WIDTH)
    for mine, whole in zip(F.permute_local(x, index, 3), F.permute(x, index, 3), strict=True):
        assert torch.equal(mine, whole)
