"""Tokens to experts and back by kernels, interpreted, against the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime import fp8
from runtime import functional as F
from runtime import gradients as G
from tests.support.kernels import KernelLoader

BF16 = ("precision.policy=bf16",)


@pytest.fixture
def permute(kernels: KernelLoader) -> ModuleType:
    """Tiny, in BF16: 16 experts, 4 of them for each token, rows of 64."""
    return kernels("permute", "deepseek_v3_tiny", sets=BF16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def routes(tokens: int, experts: int, k: int, kind: str = "even") -> Tensor:
    """Distinct experts for each token; `skewed`: nearly all choose among the last few."""
    score = random(tokens, experts, seed=tokens)
    if kind == "skewed":
        score += 4.0 * (torch.arange(experts) >= experts - k - 1)
    return score.topk(k).indices


def poisoned(rows: Tensor) -> Tensor:
    """The same rows inside of a wider tensor that is NaN all around, as `split` leaves them."""
    wide = torch.full((len(rows), rows.shape[1] + 64), torch.nan).to(rows.dtype)
    wide[:, 32:-32] = rows
    return wide[:, 32:-32]


# None, one, fewer than experts, just around a block of the sort (128 * 4 choices), several blocks.
TOKENS = [0, 1, 7, 127, 128, 129, 700]


@pytest.mark.parametrize("kind", ["even", "skewed"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_permute_is_the_reference_to_the_bit(permute: ModuleType, tokens: int, kind: str) -> None:
    x, index = poisoned(random(tokens, 64).bfloat16()), routes(tokens, 16, 4, kind)
    found, again = permute.permute(x, index, 16), permute.permute(x, index, 16)
    for one, other, expected in zip(found, again, F.permute(x, index, 16), strict=True):
        assert one.dtype == expected.dtype and torch.equal(one, expected)
        assert torch.equal(one, other)
    load = permute.expert_load(index, 16)
    assert load.dtype == torch.int64 and torch.equal(load, F.expert_load(index, 16))
    assert torch.equal(found[1], load.cumsum(0).int())


@pytest.mark.parametrize("tokens", TOKENS)
def test_permute_of_fp8_moves_rows_and_scales(kernels: KernelLoader, tokens: int) -> None:
    """Rows of 320, whose last run of 128 is short: three scales each."""
    sets = ("precision.policy=fp8_blockwise", "params.hidden_size=320")
    permute = kernels("permute", "deepseek_v3_tiny", sets=sets)
    q, s = fp8.quantize(random(tokens, 320))
    index = routes(tokens, 16, 4)
    found = permute.permute_quantized(q, poisoned(s), index, 16)
    for one, expected in zip(found, fp8.permute_quantized(q, s, index, 16), strict=True):
        assert one.dtype == expected.dtype and torch.equal(one.float(), expected.float())


def test_permute_with_the_sizes_of_v3(kernels: KernelLoader) -> None:
    permute = kernels("permute", "deepseek_v3")
    q, s = fp8.quantize(random(10, 7168))
    index = routes(10, 256, 8)
    found = permute.permute_quantized(q, s, index, 256)
    for one, expected in zip(found, fp8.permute_quantized(q, s, index, 256), strict=True):
        assert torch.equal(one.float(), expected.float())
    y, d = (random(n, 7168, seed=n).bfloat16() for n in (80, 10))
    weight, order = random(10, 8, seed=2), found[3]
    assert torch.equal(permute.unpermute(y, order, weight), F.unpermute(y, order, weight))
    assert torch.equal(permute.permute_grad(y, order, index), G.permute_grad(y, order, index))
    dy, dweight = permute.unpermute_grad(d, y, order, weight)
    expected_dy, expected_dweight = G.unpermute_grad(d, y, order, weight)
    assert torch.equal(dy, expected_dy)
    assert torch.allclose(dweight, expected_dweight, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tokens", TOKENS)
def test_unpermute(permute: ModuleType, tokens: int) -> None:
    index, weight = routes(tokens, 16, 4), random(tokens, 4, seed=1)
    _, _, order = F.permute(random(tokens, 64), index, 16)
    y = poisoned(random(4 * tokens, 64, seed=2).bfloat16())
    found = permute.unpermute(y, order, weight)
    exact = torch.zeros(tokens, 64)
    for choice in range(4):
        slot = order.argsort()[choice::4]
        exact += weight[:, choice, None].bfloat16().float() * y[slot].float()
    assert torch.equal(found, exact.bfloat16())  # summed in the order of the choices
    if tokens:  # torch has no bag of nothing
        assert torch.equal(found, F.unpermute(y, order, weight))
    assert torch.equal(found, permute.unpermute(y, order, weight))


@pytest.mark.parametrize("tokens", [0, 1, 7, 129])
def test_gradients(permute: ModuleType, tokens: int) -> None:
    """Of batches of sequences, as the model has them."""
    index, weight = routes(tokens, 16, 4).view(1, tokens, 4), random(1, tokens, 4, seed=1)
    _, _, order = F.permute(random(1, tokens, 64), index, 16)
    y, d = (random(n, 64, seed=n + 2).bfloat16() for n in (4 * tokens, tokens))
    found = permute.permute_grad(y, order, index)
    assert found.shape == (1, tokens, 64)
    dy, dweight = permute.unpermute_grad(d.view(1, tokens, 64), y, order, weight)
    assert dy.shape == y.shape and dweight.shape == weight.shape
    if tokens:
        assert torch.equal(found, G.permute_grad(y, order, index))
        expected = G.unpermute_grad(d.view(1, tokens, 64), y, order, weight)
        assert torch.equal(dy, expected[0])
        assert torch.allclose(dweight, expected[1], rtol=1e-5, atol=1e-4)
    again = permute.unpermute_grad(d.view(1, tokens, 64), y, order, weight)
    assert torch.equal(dy, again[0]) and torch.equal(dweight, again[1])


def test_what_is_not_finite_stays_with_its_token(permute: ModuleType) -> None:
    index, weight = routes(5, 16, 4), random(5, 4, seed=1).abs()
    x = random(5, 64).bfloat16()
    x[2, 3] = torch.inf
    rows, _, order = permute.permute(x, index, 16)
    y = permute.unpermute(rows, order, weight)
    bad = ~y.isfinite()
    assert bad[2, 3] and bad.sum() == 1


def test_rows_behind_two_to_the_31st_element_are_found(permute: ModuleType) -> None:
    """The rows lie 2^29 elements apart, in memory that is never touched in between."""
    stride = 2**29
    base = torch.empty(5 * stride, dtype=torch.bfloat16)  # 5 GB of addresses, 5 pages of memory
    x = base.as_strided((5, 64), (stride, 1))
    x.copy_(random(5, 64))
    index = routes(5, 16, 4)
    rows = permute.permute(x, index, 16)[0]
    assert torch.equal(rows, F.permute(x.contiguous(), index, 16)[0])
    weight = random(5, 1)
    y = permute.unpermute(x, torch.arange(5), weight.view(5, 1))
    assert torch.equal(y, F.unpermute(x.contiguous(), torch.arange(5), weight))
