"""The kernels of the gate, interpreted: experts and weights of the reference, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import functional as F
from runtime import gradients as G
from tests.support.kernels import KernelLoader

V3: dict[str, Any] = {"scoring": "sigmoid", "n_group": 8, "topk_group": 4, "k": 8}
V3 |= {"group_score": "top2_sum", "normalize": True, "scale": 2.5}
V2: dict[str, Any] = {"scoring": "softmax", "n_group": 8, "topk_group": 3, "k": 6}
V2 |= {"group_score": "max", "normalize": False, "scale": 16.0}  # 8 groups of 20
LITE: dict[str, Any] = {"scoring": "softmax", "n_group": 1, "topk_group": 1, "k": 6}
LITE |= {"group_score": "max", "normalize": False, "scale": 1.0}
GATES = {
    "deepseek_v3": (256, V3),
    "deepseek_v2_236b": (160, V2),
    "deepseek_v2_lite": (64, LITE),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def bias_of(spec: str, experts: int) -> Tensor | None:
    return 0.1 * random(experts, seed=1) if spec == "deepseek_v3" else None


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        # A NaN is the same as another one.
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


@pytest.mark.parametrize("spec", GATES)
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 13)])
def test_choice_and_weights(kernels: KernelLoader, spec: str, shape: tuple[int, ...]) -> None:
    gate = kernels("gate", spec)
    experts, settings = GATES[spec]
    x, bias = random(*shape, experts), bias_of(spec, experts)
    found = gate.gate_saving(x, bias, **settings)
    assert_equal(found, F.gate_saving(x, bias, **settings))
    assert_equal(found, gate.gate_saving(x, bias, **settings))
    assert_equal(found[:2], gate.gate(x, bias, **settings))


@pytest.mark.parametrize("spec", GATES)
def test_many_tokens(kernels: KernelLoader, spec: str) -> None:
    """So many that a bit that fell otherwise would show: 100,000 affinities."""
    gate = kernels("gate", spec)
    experts, settings = GATES[spec]
    x, bias = 3 * random(100_000 // experts, experts, seed=2), bias_of(spec, experts)
    assert_equal(gate.gate_saving(x, bias, **settings), F.gate_saving(x, bias, **settings))


@pytest.mark.parametrize("spec", GATES)
def test_ties_go_to_the_lowest_index(kernels: KernelLoader, spec: str) -> None:
    """On a grid of few values, all equal, and saturated."""
    gate = kernels("gate", spec)
    experts, settings = GATES[spec]
    grid = random(20, experts).round()
    x = torch.cat([grid, torch.zeros(1, experts), torch.full((1, experts), 200.0), -200 * grid])
    assert_equal(gate.gate_saving(x, None, **settings), F.gate_saving(x, None, **settings))
    route, _ = gate.gate(torch.zeros(1, experts), None, **settings)
    assert route.tolist() == [list(range(settings["k"]))]


def test_a_bias_below_zero_lets_no_dropped_group_back_in(kernels: KernelLoader) -> None:
    gate = kernels("gate", "deepseek_v3")
    x, bias = random(9, 256), torch.full((256,), -3.0)
    found = gate.gate(x, bias, **V3)
    assert_equal(found, F.gate(x, bias, **V3))
    groups = [set(row) for row in (found[0] // 32).tolist()]
    assert all(len(group) <= 4 for group in groups)


def test_what_is_no_number_gives_experts_that_exist(kernels: KernelLoader) -> None:
    """160 experts lie in a table of 8 times 32: none of the empty places may be chosen."""
    gate = kernels("gate", "deepseek_v2_236b")
    x = torch.cat([torch.full((1, 160), torch.nan), random(2, 160)])
    x[1, 77] = torch.nan
    assert_equal(gate.gate_saving(x, None, **V2), F.gate_saving(x, None, **V2))


@pytest.mark.parametrize("spec", GATES)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_gradient(kernels: KernelLoader, spec: str, tokens: int) -> None:
    gate = kernels("gate", spec)
    experts, settings = GATES[spec]
    x, d = random(tokens, experts), random(tokens, settings["k"], seed=1)
    d_affinity = random(tokens, experts, seed=2)
    route, _, affinity = F.gate_saving(x, bias_of(spec, experts), **settings)
    told = {name: settings[name] for name in ("scoring", "normalize", "scale")}
    found = gate.gate_grad(d, d_affinity, affinity, route, **told)
    expected = G.gate_grad(d, d_affinity, affinity, route, **told)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, gate.gate_grad(d, d_affinity, affinity, route, **told))


def test_normalized_weights_and_their_gradient_without_groups(kernels: KernelLoader) -> None:
    """Settings that no shipped model has together: softmax, a bias, division by the sum."""
    sets = ("params.norm_topk_prob=true",)
    gate = kernels("gate", "deepseek_v2_lite", sets=sets)
    settings = LITE | {"normalize": True, "scale": 1.5}
    x, bias = random(11, 64), random(64, seed=1)
    found = gate.gate_saving(x, bias, **settings)
    assert_equal(found, F.gate_saving(x, bias, **settings))
    d, d_affinity = random(11, 6, seed=2), random(11, 64, seed=3)
    told = {name: settings[name] for name in ("scoring", "normalize", "scale")}
    gradients = [g.gate_grad(d, d_affinity, found[2], found[0], **told) for g in (gate, G)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
