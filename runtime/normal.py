"""Normally distributed values by index, with which weights are initialized.

Each value is a function of a key and an index. Any part of a tensor can therefore be made without
the rest, in any order and on any device, with the same bits. This excludes generators with a state,
and also log, cos and erfinv, which devices round differently: all there is here are operations on
int32, look-ups in a table that is made on the CPU, and single additions and products in float32.

The bits are a hash of the index: the three rounds of `triple32` (C. Wellons, Hash Prospector),
with a word of the key added before each. The usual counter-based generator, Philox4x32-10 (Salmon
et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), needs the high halves of products,
which torch computes in int64 only: about 30 int64 operations per element instead of 18 on int32.
tests/runtime/test_normal.py checks moments, tails, the Kolmogorov-Smirnov distance, avalanche, and
the correlation of neighbours, rows, names and seeds.

Each half of the 32 bits selects one of 65,536 quantiles of N(0, 1/2). The sum of the two is
N(0, 1) but for an excess kurtosis of about -0.0005, and reaches 6.1 standard deviations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

CPU_CHUNK, GPU_CHUNK = 1 << 15, 1 << 21
"""Numbers made at a time: with 16 bytes of buffers each, they stay in the L2 cache. On the CPU,
torch splits longer operations among threads, which gains little and costs much on busy cores."""
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
"""Shift and factor of each round of the hash."""
LAST_SHIFT = 14

Key = tuple[int, ...]
"""One word of 32 bits for each round of the hash."""


def tensor_key(seed: int, name: str) -> Key:
    """The key of the published tensor `name`."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return tuple(int.from_bytes(digest[4 * i : 4 * i + 4], "big") for i in range(len(ROUNDS)))


def fill_normal(
    out: Tensor,
    key: Key,
    mean: float = 0.0,
    std: float = 1.0,
    start: int = 0,
    strides: Sequence[int] | None = None,
) -> None:
    """Writes N(mean, std^2) to `out`, which is a whole tensor or any part of one.

    `out[i, j]` is element `start + i * strides[0] + j * strides[1]` of the tensor, likewise for
    other numbers of dimensions; without `strides`, `out` is the elements from `start` on, in order.
    Numbers are made in float32 on the device of `out`, then cast to its dtype.

    Raises ValueError for elements from 2^32 on, whose values would repeat those of others.
    """
    if out.numel() == 0:
        return
    if strides is None:
        out = out.view(-1) if out.is_contiguous() else out
        strides = [out.shape[d + 1 :].numel() for d in range(out.dim())]
    last = start + sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True))
    if last >> 32:
        raise ValueError(f"element {last:,} cannot be initialized: a tensor has 2^32 at most")
    chunk = min(out.numel(), CPU_CHUNK if out.device.type == "cpu" else GPU_CHUNK)
    ints = torch.empty(2, chunk, dtype=torch.int32, device=out.device)
    floats = torch.empty(2, chunk, dtype=torch.float32, device=out.device)
    arange = torch.arange(min(chunk, max(out.shape, default=1)), device=out.device).int()
    for part, first in _chunks(out, start, strides, chunk):
        x, scratch = (buffer[: part.numel()].view(part.shape) for buffer in ints)
        _indices(arange, first + key[0], strides, out=x)
        _hash(x, key, scratch)
        values = _normal(x.view(-1), scratch.view(-1), floats[:, : part.numel()])
        part.copy_(values.mul_(std).add_(mean).view(part.shape))


def uniform(count: int, key: Key) -> Tensor:
    """Numbers 0 to `count` - 1 of a key, uniform between 0 and 1, neither included: float64
    [count], on the CPU."""
    x = torch.arange(count, dtype=torch.int32) + _int32(key[0])
    _hash(x, key, torch.empty_like(x))
    return (x.double() + (2.0**31 + 0.5)) / 2.0**32


def _chunks(
    out: Tensor, start: int, strides: Sequence[int], size: int
) -> Iterator[tuple[Tensor, int]]:
    """Views that make up `out`, of at most `size` elements each, with the index of their first."""
    if out.numel() <= size:
        yield out, start
        return
    dim = next(d for d, n in enumerate(out.shape) if n > 1)
    step = max(1, size // (out.numel() // out.shape[dim]))
    for i in range(0, out.shape[dim], step):
        part = out.narrow(dim, i, min(step, out.shape[dim] - i))
        yield from _chunks(part, start + i * strides[dim], strides, size)


def _indices(arange: Tensor, start: int, strides: Sequence[int], out: Tensor) -> None:
    """`start + i * strides[0] + j * strides[1] + ...`, modulo 2^32."""
    along = [arange[:n] * _int32(stride) for n, stride in zip(out.shape, strides, strict=True)]
    rows = torch.full((1,) * out.dim(), _int32(start), dtype=torch.int32, device=out.device)
    for dim, values in enumerate(along[:-1]):
        rows = rows + values.view(-1, *[1] * (out.dim() - dim - 1))
    torch.add(rows, along[-1] if along else 0, out=out)


def _hash(x: Tensor, key: Key, scratch: Tensor) -> None:
    """Replaces int32 values, to which the first word of the key was added, by their hashes."""
    for i, (shift, factor) in enumerate(ROUNDS):
        if i:
            x.add_(_int32(key[i]))
        _xor_shift(x, shift, scratch)
        x.mul_(_int32(factor))
    _xor_shift(x, LAST_SHIFT, scratch)


def _xor_shift(x: Tensor, shift: int, scratch: Tensor) -> None:
    """x ^= x >> shift, with zeros shifted in."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << 32 - shift) - 1))


def _normal(x: Tensor, scratch: Tensor, floats: Tensor) -> Tensor:
    """The samples of N(0, 1) that 32 random bits each select, in the first row of `floats`."""
    table = _quantiles(x.device)
    torch.bitwise_right_shift(x, 16, out=scratch)
    torch.index_select(table, 0, scratch.bitwise_and_(0xFFFF), out=floats[0])
    torch.index_select(table, 0, x.bitwise_and_(0xFFFF), out=floats[1])
    return floats[0].add_(floats[1])


@cache
def _quantiles(device: torch.device) -> Tensor:
    """65,536 equally probable values of N(0, 1/2), float32: symmetric, of variance 1/2 exactly."""
    order = torch.arange(1 << 15, dtype=torch.float64, device="cpu")
    half = torch.special.ndtri((order + 0.5) / (1 << 16))
    half *= (0.5 / half.square().mean()).sqrt()
    return torch.cat((half, -half.flip(0))).float().to(device)


def _int32(word: int) -> int:
    """The int32 with the lowest 32 bits of `word`."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
