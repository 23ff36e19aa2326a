"""The optimizer against torch's own, and against its equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.optimizer import adamw_step, clip_factor, square_sum

# Those of DeepSeek-V3, but for a learning rate at which steps are seen.
V3: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def test_steps_are_those_of_torch() -> None:
    """Also of torch's clipping."""
    shapes = [(5, 7), (3,), ()]
    theirs = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    ours = [p.detach().clone() for p in theirs]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in ours]
    betas = (V3["beta1"], V3["beta2"])
    optimizer = torch.optim.AdamW(theirs, V3["lr"], betas, V3["eps"], V3["weight_decay"])
    for step in range(1, 30):
        scale = 10.0 if step % 2 else 0.01
        grads = [scale * random(*shape, seed=7 * step + i) for i, shape in enumerate(shapes)]
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        squares = square_sum(grads)
        assert torch.allclose(squares.sqrt(), norm, rtol=1e-6)
        factor = clip_factor(squares, 1.0)
        for w, grad, (m, v) in zip(ours, grads, moments, strict=True):
            adamw_step(w, grad, m, v, step=step, factor=factor, **V3)
        for w, p in zip(ours, theirs, strict=True):
            assert torch.allclose(w, p, rtol=1e-5, atol=1e-7)


def test_moments_and_weight_are_rounded_to_nearest_and_the_master_is_not() -> None:
    master, grad = random(1000), random(1000, seed=1).bfloat16()
    m, v = (0.1 * random(1000, seed=2)).bfloat16(), random(1000, seed=3).square().bfloat16()
    w64, m64, v64, g64 = (t.double() for t in (master, m, v, grad))
    weight, factor = torch.empty(1000, dtype=torch.bfloat16), torch.tensor(0.25)
    adamw_step(master, grad, m, v, step=3, factor=factor, weight=weight, **V3)
    g64 = g64 * 0.25
    m64 = 0.9 * m64 + 0.1 * g64
    v64 = 0.95 * v64 + 0.05 * g64.square()
    root = (v64 / (1 - 0.95**3)).sqrt() + 1e-8
    w64 = (1 - 1e-2 * 0.1) * w64 - 1e-2 * (m64 / (1 - 0.9**3)) / root
    assert torch.allclose(master.double(), w64, rtol=1e-6, atol=1e-7)
    for rounded, exact in ((m, m64), (v, v64)):
        # All but those that float32 itself rounds across the middle of two neighbours.
        assert (rounded != exact.float().bfloat16()).sum() <= 1
    assert torch.equal(weight, master.bfloat16())


def test_the_gradient_stays_as_it_is() -> None:
    grad = random(10)
    before = grad.clone()
    zeros = [torch.zeros(10) for _ in range(3)]
    adamw_step(zeros[0], grad, zeros[1], zeros[2], step=1, factor=torch.tensor(0.5), **V3)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_is_seen(bad: float) -> None:
    factor = clip_factor(square_sum([torch.ones(3), torch.tensor([1.0, bad])]), 1.0)
    assert factor.isnan() or factor == 0


def test_no_gradients_have_the_norm_zero() -> None:
    assert square_sum([]) == 0 and clip_factor(square_sum([]), 1.0) == 1
