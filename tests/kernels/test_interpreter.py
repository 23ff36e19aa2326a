"""The interpreter that proves kernels is itself held against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.support.interpreter import repair

repair()


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def sum_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(y + at, value + value)


@triton.jit
def divide_kernel(x, y, z, N: tl.constexpr, ROUNDED: tl.constexpr):
    at = tl.arange(0, N)
    if ROUNDED:
        tl.store(z + at, tl.div_rn(tl.load(x + at), tl.load(y + at)))
    else:
        tl.store(z + at, tl.load(x + at) / tl.load(y + at))


def edge_cases() -> torch.Tensor:
    """Ties, carries, subnormals, what saturates, infinities, NaN, and noise of every size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2028, generator=generator) * 10 ** torch.linspace(-6, 4, 2028)
    special = [125.06, 464.0, 448.0, 449.0, -464.0, 1e9, float("inf"), float("-inf"), float("nan")]
    special += [
        0.0,
        -0.0,
        2**-9,
        2**-10,
        1.5 * 2**-9,
        2**-133,
        1.0625,
        1.1875,
        -1.0625,
        3.4e38,
        1.0,
    ]
    return torch.cat([torch.tensor(special), noise])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_are_torch_s(dtype: torch.dtype) -> None:
    x = edge_cases()
    y = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, y, N=len(x))
    assert torch.equal(y.view(torch.uint8), x.to(dtype).view(torch.uint8))
    back = torch.empty(len(x))
    cast_kernel[(1,)](y, back, N=len(x))
    assert torch.equal(back.view(torch.int32), y.float().view(torch.int32))


def test_products_of_bfloat16_are_products_of_numbers() -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    assert torch.allclose(c, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_arithmetic_on_bfloat16_is_an_error() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to float32"):
        sum_kernel[(1,)](x, x, N=16)


def test_a_division_is_approximate_unless_it_is_div_rn() -> None:
    x, y = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0)) + 0.5
    z = torch.empty(1024)
    divide_kernel[(1,)](x, y, z, N=1024, ROUNDED=True)
    assert torch.equal(z, x / y)
    divide_kernel[(1,)](x, y, z, N=1024, ROUNDED=False)
    off = (z.view(torch.int32) - (x / y).view(torch.int32)).abs()
    assert off.min() == off.max() == 1
