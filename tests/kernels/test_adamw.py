"""The optimizer's kernels, interpreted, against the reference."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import optimizer
from tests.support.kernels import KernelLoader

V3: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def adamw(kernels: KernelLoader, vendor: str) -> ModuleType:
    return kernels("adamw", "deepseek_v3_tiny", vendor)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def state(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Master, gradient, both moments, and the weight, which is poison: nobody reads it."""
    moments = [0.1 * random(*shape, seed=2), random(*shape, seed=3).square()]
    weight = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    return [random(*shape), random(*shape, seed=1), *(m.to(dtype) for m in moments), weight]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 300), (3, 1024)])
def test_a_step(adamw: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    keywords = {**V3, "step": 3, "factor": torch.tensor(0.25)}
    states = [state(*shape, dtype=dtype) for _ in range(3)]
    for step, (*tensors, weight) in zip(
        (adamw.adamw_step, adamw.adamw_step, optimizer.adamw_step), states, strict=True
    ):
        step(*tensors, weight=weight, **keywords)
    found, again, expected = states
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert torch.equal(found[1], expected[1])  # the gradient stays
    assert torch.allclose(found[0], expected[0], rtol=1e-6, atol=1e-7)
    for one, other in zip(found[2:], expected[2:], strict=True):
        # A sum that falls on the other side of a middle rounds to the number beside it.
        rounding = 2**-7 if one.dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(one.float(), other.float(), rtol=rounding, atol=1e-7)
        assert (one != other).sum() <= (
            one.numel() // 100 if one.dtype == torch.bfloat16 else 10**9
        )


def test_without_clipping_and_with_weights_that_are_their_own_masters(adamw: ModuleType) -> None:
    keywords = {**V3, "step": 1}
    states = [state(65, dtype=torch.float32)[:4] for _ in range(2)]
    adamw.adamw_step(*states[0], **keywords)
    optimizer.adamw_step(*states[1], **keywords)
    for found, expected in zip(*states, strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_what_does_not_lie_in_one_piece_is_left_to_torch(adamw: ModuleType) -> None:
    master, grad, m, v, weight = state(8, 8, dtype=torch.bfloat16)
    before = master.clone()
    step = adamw.adamw_step(master.t(), grad.t(), m.t(), v.t(), weight=weight, step=1, **V3)
    assert step is NotImplemented and torch.equal(master, before)


SHAPES: list[list[tuple[int, ...]]] = [[(1,)], [(1000,), (), (0,), (5, 1000)], [(2001, 1001)]]


@pytest.mark.parametrize("shapes", SHAPES)
def test_the_sum_of_squares(adamw: ModuleType, shapes: list[tuple[int, ...]]) -> None:
    """Of the last one each program takes two turns, but not all a second one."""
    grads = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = adamw.square_sum(grads)
    exact = sum(g.double().square().sum() for g in grads)
    assert found.dtype == torch.float32 and found.shape == ()
    assert abs(found - exact) <= 1e-6 * exact
    assert torch.equal(found, adamw.square_sum(grads))
    factor = optimizer.clip_factor(found, 1.0)
    assert torch.allclose(factor, optimizer.clip_factor(optimizer.square_sum(grads), 1.0))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_seen(adamw: ModuleType, bad: float) -> None:
    grad = torch.ones(3000)
    grad[2999] = bad
    assert not adamw.square_sum([grad]).isfinite()
