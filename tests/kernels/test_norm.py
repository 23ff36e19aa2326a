"""RMSNorm kernels, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime import fp8, functional, gradients
from tests.support.kernels import KernelLoader

SIZES = [(0, 512), (1, 7168), (5, 7168), (17, 512), (3, 1536)]


def rows_of(rows: int, hidden: int, seed: int = 0) -> Tensor:
    """Rows of a wider tensor, as `split` leaves them; what lies between them is poison."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, hidden + 64), torch.nan, dtype=torch.bfloat16)
    wide[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    return wide[:, :hidden]


def near(found: Tensor, expected: Tensor) -> None:
    """Sums that differ in float32 may round to the bfloat16 beside, at most 2^-7 away."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_rms_norm(kernels: KernelLoader, vendor: str, rows: int, hidden: int) -> None:
    norm = kernels("norm", "deepseek_v3", vendor)
    x, weight = rows_of(rows, hidden), rows_of(1, hidden, 1)[0]
    y = norm.rms_norm(x, weight, eps=1e-6)
    near(y, functional.rms_norm(x, weight, eps=1e-6))
    assert torch.equal(y, norm.rms_norm(x, weight, eps=1e-6))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_add_rms_norm(kernels: KernelLoader, vendor: str, rows: int) -> None:
    norm = kernels("norm", "deepseek_v3", vendor)
    x, y, weight = rows_of(rows, 7168), rows_of(rows, 7168, 1), rows_of(1, 7168, 2)[0]
    total, normed = norm.add_rms_norm(x, y, weight, eps=1e-6)
    expected_total, expected = functional.add_rms_norm(x, y, weight, eps=1e-6)
    assert torch.equal(total, expected_total)
    near(normed, expected)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize(("rows", "hidden"), [(0, 512), (5, 512), (3, 1536)])
def test_norm_cast(kernels: KernelLoader, vendor: str, rows: int, hidden: int, scale: str) -> None:
    """To the bit what the kernel without a cast gives, cast."""
    norm = kernels("norm", "deepseek_v3", vendor)
    x, weight = rows_of(rows, hidden), rows_of(1, hidden, 1)[0]
    if rows:
        x[0] = 0
    found = norm.rms_norm_quantize(x, weight, 1e-6, scale)
    expected = fp8.quantize(norm.rms_norm(x, weight, 1e-6), scale)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and torch.equal(one.float(), other.float())


@pytest.mark.parametrize(("rows", "hidden"), [*SIZES, (2500, 512)])
def test_gradients(kernels: KernelLoader, vendor: str, rows: int, hidden: int) -> None:
    norm = kernels("norm", "deepseek_v3", vendor)
    d, x, weight = rows_of(rows, hidden), rows_of(rows, hidden, 1), rows_of(1, hidden, 2)[0]
    dx, dw = norm.rms_norm_grad(d, x, weight, eps=1e-6)
    # In float64, since either sum may be the one that is further off.
    exact = [t.double() for t in (d, x, weight)]
    want_x, want_w = gradients.rms_norm_grad(exact[0], exact[1], exact[2], eps=1e-6)
    assert dx.dtype == dw.dtype == torch.bfloat16
    torch.testing.assert_close(dx.double(), want_x, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dw.double(), want_w, rtol=2**-7, atol=1e-4)
    assert all(map(torch.equal, (dx, dw), norm.rms_norm_grad(d, x, weight, eps=1e-6)))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gradients_through_a_sum(kernels: KernelLoader, vendor: str, rows: int) -> None:
    norm = kernels("norm", "deepseek_v3", vendor)
    d_total, d, x = (rows_of(rows, 7168, seed) for seed in range(3))
    weight = rows_of(1, 7168, 3)[0]
    dx, dw = norm.add_rms_norm_grad(d_total, d, x, weight, eps=1e-6)
    only, only_w = norm.rms_norm_grad(d, x, weight, eps=1e-6)
    assert torch.equal(dx, d_total + only) and torch.equal(dw, only_w)


def test_rows_that_lie_far_apart(kernels: KernelLoader) -> None:
    """Beyond 2^31 numbers, in memory that is never touched between them."""
    norm = kernels("norm", "deepseek_v3", "sm_90")
    x = torch.empty(2**31 + 1024, dtype=torch.bfloat16).as_strided((2, 512), (2**31, 1))
    x[:] = rows_of(2, 512)
    weight = torch.ones(512, dtype=torch.bfloat16)
    near(norm.rms_norm(x, weight, eps=1e-6), functional.rms_norm(x, weight, eps=1e-6))
    found, close = (norm.rms_norm_grad(x, y, weight, eps=1e-6) for y in (x, x.clone()))
    assert all(map(torch.equal, found, close))
