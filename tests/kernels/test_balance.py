"""The balance loss by kernels, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime import functional as F
from runtime import gradients as G
from tests.support.kernels import KernelLoader

# A model, its experts, and k. 160 and 64 experts are no multiple of 256, one is no power of two.
GATES = {"deepseek_v3": (256, 8), "deepseek_v2_236b": (160, 6), "deepseek_v2_lite": (64, 6)}


def affinities(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed)).sigmoid()


@pytest.mark.parametrize("spec", GATES)
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 31), (3, 33)])
def test_loss_and_gradient(kernels: KernelLoader, spec: str, batch: int, seq: int) -> None:
    balance, (experts, k) = kernels("balance", spec), GATES[spec]
    score, d = affinities(batch, seq, experts), torch.tensor(0.3)
    loss = balance.sequence_balance_loss(score, k)
    expected = F.sequence_balance_loss(score, k)
    assert loss.shape == () and loss.dtype == expected.dtype
    assert torch.allclose(loss, expected, rtol=1e-5)
    grad = balance.sequence_balance_loss_grad(d, score, k)
    assert torch.allclose(grad, G.sequence_balance_loss_grad(d, score, k), rtol=1e-4, atol=1e-9)
    assert torch.equal(loss, balance.sequence_balance_loss(score, k))
    assert torch.equal(grad, balance.sequence_balance_loss_grad(d, score, k))


def test_counts_are_those_of_the_reference(kernels: KernelLoader) -> None:
    """Exactly, also where all affinities are equal: the lowest indices count."""
    balance = kernels("balance", "deepseek_v3")
    score = (affinities(2, 70, 256) * 8).round() / 8  # a coarse grid: many ties
    score[1, 5] = 0.5
    score[1, 6] = torch.nan
    _, frequency = balance.balance(score, 8)
    counts = F.chosen(score, 8).sum(-2)
    assert torch.equal((frequency * (70 * 8 / 256)).round(), counts)
    assert counts.sum() == 2 * 70 * 8


def test_perfect_balance_is_one(kernels: KernelLoader) -> None:
    balance = kernels("balance", "deepseek_v2_lite")
    score = 0.01 + torch.eye(64).repeat(1, 3, 1)
    score = sum(score.roll(i, -1) for i in range(6))
    assert balance.sequence_balance_loss(score, 6).item() == pytest.approx(1.0, rel=1e-5)


def test_no_sequence(kernels: KernelLoader) -> None:
    balance = kernels("balance", "deepseek_v3")
    score = affinities(0, 7, 256)
    assert balance.sequence_balance_loss(score, 8).isnan()
    grad = balance.sequence_balance_loss_grad(torch.tensor(1.0), score, 8)
    assert grad.shape == score.shape
