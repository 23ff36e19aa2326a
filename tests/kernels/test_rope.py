"""Rotary embedding kernels, interpreted: equal to the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime import functional, gradients
from tests.support.kernels import KernelLoader

SHAPES = [(1, 1), (2, 3), (2, 0)]
HEADS = [(128, 128, 64, 128), (3, 20, 12, 36)]  # heads, own, turned, value


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers [.., d] of a wider tensor, as `split` leaves them; poison lies beside them."""
    wide = torch.full((*shape[:-1], shape[-1] + 16), torch.nan, dtype=torch.bfloat16)
    wide[..., 16:] = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return wide[..., 16:]


def table(shape: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    position = 1000 * torch.arange(shape[0] * shape[1]).view(shape)
    return functional.rope_table(position, dim=dim, theta=1e4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", HEADS)
def test_queries(
    kernels: KernelLoader, vendor: str, shape: tuple[int, int], sizes: tuple[int, int, int, int]
) -> None:
    rope = kernels("rope", "deepseek_v3", vendor)
    heads, own, turned, _ = sizes
    angles, x = table(shape, turned), numbers(*shape, heads, own + turned)
    assert torch.equal(rope.rotate_last(x, *angles), functional.rotate_last(x, *angles))
    part = x[..., own:]
    assert torch.equal(rope.rotate(part, *angles), functional.rotate(part, *angles))
    shared = numbers(*shape, turned)
    assert torch.equal(rope.rotate(shared, *angles), functional.rotate(shared, *angles))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", HEADS)
def test_keys(
    kernels: KernelLoader, vendor: str, shape: tuple[int, int], sizes: tuple[int, int, int, int]
) -> None:
    rope = kernels("rope", "deepseek_v3", vendor)
    heads, own, turned, value = sizes
    angles, x, shared = table(shape, turned), numbers(*shape, heads, own), numbers(*shape, turned)
    found = rope.join_rotated(x, shared, *angles)
    assert torch.equal(found, functional.join_rotated(x, shared, *angles))
    d, d_v = numbers(*shape, heads, own + turned), numbers(*shape, heads, value, seed=1)
    both, d_shared = rope.join_rotated_grad(d, d_v, *angles)
    want, want_shared = gradients.join_rotated_grad(d, d_v, *angles)
    assert torch.equal(both, want)
    # Sums over heads that differ in float32 may round to the bfloat16 beside.
    torch.testing.assert_close(d_shared, want_shared, rtol=2**-6, atol=2**-5)
    assert torch.equal(d_shared, rope.join_rotated_grad(d, d_v, *angles)[1])


def test_tokens_that_lie_far_apart(kernels: KernelLoader) -> None:
    """Beyond 2^31 numbers, in memory that is never touched between them."""
    rope = kernels("rope", "deepseek_v3", "sm_90")
    angles, x = table((1, 2), 16), numbers(1, 2, 2, 48)
    far = torch.empty(2**31 + 1024, dtype=torch.bfloat16)
    far = far.as_strided((1, 2, 2, 48), (2**31, 2**31, 48, 1))
    far[:] = x
    assert torch.equal(rope.rotate_last(far, *angles), functional.rotate_last(x, *angles))
    shared = numbers(1, 2, 16)
    assert torch.equal(
        rope.join_rotated(far, shared, *angles), functional.join_rotated(x, shared, *angles)
    )
