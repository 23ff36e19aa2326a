"""SwiGLU kernels, interpreted, against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from runtime import fp8, functional, gradients
from tests.support.kernels import KernelLoader

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

SIZES = [(0, 128), (1, 2048), (5, 200), (150, 128)]


def operands(rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, and gate and up behind one another, as one product makes them."""
    generator = torch.Generator().manual_seed(rows)
    d, both = (torch.randn(rows, n, generator=generator) for n in (size, 2 * size))
    gate, up = (3 * both).bfloat16().split(size, -1)
    return d.bfloat16(), gate, up


def near(found: Tensor, expected: Tensor) -> None:
    """Exponentials may differ in their last bit, and then a rounding to bfloat16."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-6)
    assert (found != expected).float().mean() < 0.02 if found.numel() else True


def near_fp8(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for q, s, want_q, want_s in zip(
        found[::2], found[1::2], expected[::2], expected[1::2], strict=True
    ):
        assert (q.shape, s.shape) == (want_q.shape, want_s.shape)
        torch.testing.assert_close(s, want_s, rtol=2**-7, atol=0)
        # The next number of E4M3 is at most an eighth away.
        torch.testing.assert_close(q.float(), want_q.float(), rtol=0.13, atol=2**-9)
        assert (q.float() != want_q.float()).float().mean() < 0.05 if q.numel() else True


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_swiglu_and_its_gradient(kernels: KernelLoader, vendor: str, rows: int, size: int) -> None:
    d, gate, up = operands(rows, size)
    swiglu = kernels("swiglu", "deepseek_v3_tiny", vendor)
    y = swiglu.swiglu(gate, up)
    near(y, functional.swiglu(gate, up))
    both = swiglu.swiglu_grad_joined(d, gate, up)
    near(both, gradients.swiglu_grad_joined(d, gate, up))
    assert torch.equal(y, swiglu.swiglu(gate, up))
    assert torch.equal(both, swiglu.swiglu_grad_joined(d, gate, up))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_swiglu_cast(kernels: KernelLoader, vendor: str, rows: int, size: int, scale: str) -> None:
    _, gate, up = operands(rows, size)
    swiglu = kernels("swiglu", "deepseek_v3", vendor)
    found = swiglu.swiglu_quantize(gate, up, scale)
    plain = kernels("swiglu", "deepseek_v3_tiny", vendor).swiglu(gate, up)
    for one, expected in zip(found, fp8.quantize(plain, scale), strict=True):
        assert torch.equal(one.float(), expected.float())
    near_fp8(found, fp8.swiglu_quantize(gate, up, scale))


@pytest.mark.parametrize("ends", [None, (0, 0, 0), (130, 130, 131), (0, 1, 129)])
def test_gradients_cast(kernels: KernelLoader, vendor: str, ends: Sequence[int] | None) -> None:
    """To the bit what the kernel without a cast gives, cast: in rows, and in tiles of tokens."""
    d, gate, up = operands(ends[-1] if ends else 140, 256)
    of = () if ends is None else (torch.tensor(ends, dtype=torch.int32),)
    swiglu = kernels("swiglu", "deepseek_v3", vendor)
    found = swiglu.swiglu_grad_quantize(d, gate, up, *of, scale="fp32")
    both = kernels("swiglu", "deepseek_v3_tiny", vendor).swiglu_grad_joined(d, gate, up)
    for one, expected in zip(found, fp8.quantize_both(both, *of), strict=True):
        assert torch.equal(one.float(), expected.float())
    near_fp8(found, fp8.swiglu_grad_quantize(d, gate, up, *of))


def test_large_numbers_saturate_nothing_and_hide_nothing(
    kernels: KernelLoader, vendor: str
) -> None:
    gate = torch.tensor([[-3e38, 3e38, torch.inf, -torch.inf, torch.nan, 0.0]]).bfloat16()
    up = torch.tensor([[1.0, 1e-30, 1.0, 1.0, 1.0, torch.nan]]).bfloat16()
    found = kernels("swiglu", "deepseek_v3_tiny", vendor).swiglu(gate, up)
    expected = functional.swiglu(gate, up)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_rows_that_lie_far_apart(kernels: KernelLoader) -> None:
    """Beyond 2^31 numbers, in memory that is never touched between them."""
    swiglu = kernels("swiglu", "deepseek_v3", "sm_90")
    d, gate, up = operands(2, 128)
    far = torch.empty(2**31 + 1024, dtype=torch.bfloat16).as_strided((2, 128), (2**31, 1))
    far[:] = gate
    for one, expected in zip(
        swiglu.swiglu_grad_quantize(d, far, up), swiglu.swiglu_grad_quantize(d, gate, up),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one.float(), expected.float())
