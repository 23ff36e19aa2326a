"""The choice of a GEMM: all give the same product up to rounding, at different speeds.

Where torch has a choice on the CPU, its matmul takes MKL for float32, and MKL keeps to AVX2 on
processors that are not Intel's: oneDNN takes half of the time there (2048 x 256 by 256 x 96: 0.40
ms against 0.97 on one core of a Zen 5), and for bfloat16 torch takes it anyway. Without AVX-512
there is neither, and torch's own loops for bfloat16 take ten times as long as float32.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as torch_f
from torch import Tensor

FEW = 8
"""Up to this many rows, reading the weight takes the time: all kernels are equally fast."""

LARGE = 2**19
"""With this many elements, oneDNN also reads the weight faster (8192 x 512: 0.73 ms, MKL 1.13)."""

NARROW_ROWS = 2
"""Up to this many rows of bfloat16 torch's own loops keep up: they read half of the bytes."""

BUCKET = 32
"""oneDNN makes a kernel for each new number of rows, which takes as long as to multiply some 500
rows of 512 by 256. Routing brings new counts with every batch; rounded up, they are few."""


_state = threading.local()


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it, a row's bits do not depend on the other rows of a call, nor on how many."""
    before, _state.invariant = is_batch_invariant(), True
    try:
        yield
    finally:
        _state.invariant = before


def is_batch_invariant() -> bool:
    return getattr(_state, "invariant", False)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` for x [..., in] and weight [out, in], of any strides: [..., out]."""
    if is_batch_invariant():
        return _row_invariant(x, weight)
    many = x.numel() > FEW * x.shape[-1] or weight.numel() >= LARGE
    if many and x.numel() and _suits_onednn(x):
        return _onednn(x, weight)
    return linear(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` for x [..., in] and weight [out, in], by torch, in float32 where that is faster."""
    few = x.numel() <= NARROW_ROWS * x.shape[-1]
    return torch_f.linear(x, weight) if few else in_float32(torch_f.linear, x, weight)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [n, i, j] times b [n, j, k], by torch, in float32 where that is faster: [n, i, k]."""
    return in_float32(torch.bmm, a, b)


def in_float32(compute: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """`compute(*factors)`; for bfloat16 in float32 where torch's own loops are slow.

    Either way sums are float32, and rounded once. `by_rows` goes within: rounded results would hide
    most of the sums that are made in another order.
    """
    first = factors[0]
    if not _BFLOAT16_IS_SLOW or first.dtype is not torch.bfloat16 or first.device.type != "cpu":
        return compute(*factors)
    return compute(*(factor.float() for factor in factors)).to(torch.bfloat16)


def grouped_product(x: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
    """`x W_e^T` for the rows of each expert e: x [slots, in], weight [experts, out, in].

    `offs` int32 [experts] says where each expert's rows end.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        out = x.new_empty(len(x), weight.shape[1])
        if is_batch_invariant():
            start = 0
            for expert, end in enumerate(offs.tolist()):
                if end > start:
                    out[start:end] = _row_invariant(x[start:end], weight[expert])
                start = end
            return out
        if len(x) <= FEW:
            _row_by_row(x, offs, weight, out)
            return out
        for part in _parts(offs, len(x)):
            out[part.exact] = product(x[part.wider], weight[part.expert])[part.inside]
        return out
    if grouped_mm_takes(x, weight):
        return torch_f.grouped_mm(x, weight.transpose(-1, -2), offs=offs)
    counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
    parts = zip(x.split(counts), weight.unbind(), strict=True)
    return torch.cat([linear(rows, matrix) for rows, matrix in parts])


def _row_by_row(x: Tensor, offs: Tensor, weight: Tensor, out: Tensor) -> None:
    """What decoding asks for: the calls around a product take longer than the product."""
    place = torch.arange(len(x), dtype=offs.dtype, device=offs.device)
    expert_of = torch.searchsorted(offs, place, right=True).tolist()
    matrices = weight.transpose(-1, -2)
    # Not strict: no rows at all are split into one part.
    for expert, row, result in zip(expert_of, x.split(1), out.split(1), strict=False):
        torch.mm(row, matrices[expert], out=result)


def grouped_outer(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """`a_e^T b_e` over the rows of each expert, zeros where it has none: [experts, m, n].

    a [slots, m], b [slots, n]; no gradient follows from it.
    """
    if a.device.type != "cpu" and grouped_mm_takes(a, b):
        return torch_f.grouped_mm(a.t(), b, offs=offs)
    out = a.new_zeros(len(offs), a.shape[1], b.shape[1])
    for part in _parts(offs, len(a)):
        # Rows of other experts count as zero.
        columns = a.new_zeros(a.shape[1], part.wider.stop - part.wider.start)
        columns[:, part.inside] = a[part.exact].t()
        out[part.expert] = product(columns, b[part.wider].t())
    return out


@dataclass(frozen=True)
class _Part:
    """The rows of one expert: `exact`, and `wider` by rows of others to a number seen before."""

    expert: int
    exact: slice
    wider: slice
    inside: slice
    """Where the exact rows are among the wider."""


def _parts(offs: Tensor, slots: int) -> Iterator[_Part]:
    """Those of the experts that have any rows."""
    start = 0
    for expert, end in enumerate(offs.tolist()):
        rows = end - start
        if not rows:
            continue
        size = rows if rows <= FEW else min(-(-rows // BUCKET) * BUCKET, slots)
        first = min(start, slots - size)
        yield _Part(
            expert,
            slice(start, end),
            slice(first, first + size),
            slice(start - first, end - first),
        )
        start = end


def _row_invariant(x: Tensor, weight: Tensor) -> Tensor:
    """`product`, each row with the bits that it has in any call."""
    rows = x.reshape(-1, x.shape[-1])
    out = in_float32(partial(by_rows, torch_f.linear), rows, weight)
    return out.view(*x.shape[:-1], len(weight))


TILE = 32
"""Rows of a call, at most, where no row's bits may depend on how many there are."""

FILLED = 4
"""Rows that a call may be filled up to, at most: what one row alone costs."""

ALIGNED = 64
"""Bytes that new tensors are aligned to."""

_AGREEING: dict[tuple[object, ...], tuple[int, int]] = {}
"""From how many rows on to how many all calls agree, for a kind of product."""


Product = Callable[[Tensor, Tensor], Tensor]
"""Of rows [n, ...] with a weight: [n, ...]."""


def by_rows(compute: Product, x: Tensor, weight: Tensor) -> Tensor:
    """`compute(x, weight)` of rows x [n, ...], each row with the same bits for any n: in calls of
    such sizes as agree, the last of which is filled up."""
    key = (weight.shape, weight.stride(), weight.dtype, weight.device, torch.get_num_threads())
    sizes = _AGREEING.get(key)
    if sizes is None:
        sizes = _AGREEING[key] = _agreeing_sizes(compute, x, weight)
    return _in_parts(compute, x, weight, *sizes)


def _in_parts(compute: Product, x: Tensor, weight: Tensor, fewest: int, most: int) -> Tensor:
    rows = x.shape[0]
    if rows > most:
        parts = (_in_parts(compute, part, weight, fewest, most) for part in x.split(most))
        return torch.cat(list(parts))
    if rows >= fewest:
        return compute(_placed(x), weight)
    if rows == 1:  # any rows may fill it up: the same one is the cheapest
        return compute(x.expand(fewest, *x.shape[1:]).contiguous(), weight)[:1]
    filled = x.new_zeros(fewest, *x.shape[1:])
    filled[:rows] = x
    return compute(filled, weight)[:rows]


def _placed(x: Tensor) -> Tensor:
    """The rows where new ones would be: MKL's order of sums may depend on the address of a row."""
    if x.data_ptr() % ALIGNED:
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def _agreeing_sizes(compute: Product, like: Tensor, weight: Tensor) -> tuple[int, int]:
    """The counts of rows, from the first to the second, for which a row has the same bits.

    Libraries have a kernel for one row, others for few and for many, which sum in different orders:
    MKL, for one, has borders at 2, and between 3 and 16 by the shape. Every number is tried, once
    for each shape, with random values in place of the weight's; of the ranges that begin with few
    rows the longest is taken. One row at a time is always a range, and the only one where the place
    in a call matters, as it does for rows of odd lengths where vectors have 32 bytes.
    """
    generator = torch.Generator(like.device).manual_seed(0)

    def random(x: Tensor) -> Tensor:
        return x.copy_(torch.randn(x.shape, generator=generator, device=x.device))

    matrix = random(
        torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    )
    x = random(torch.empty(TILE, *like.shape[1:], dtype=like.dtype, device=like.device))

    def in_calls(x: Tensor, n: int) -> Tensor:
        """So many rows in each; fewer that are left are left out."""
        starts = range(0, TILE // n * n, n)
        return torch.cat([compute(_placed(x[i : i + n]), matrix) for i in starts])

    found = [in_calls(x, n) for n in range(1, TILE + 1)]
    # All rows once more, each at another place of its call.
    moved = [in_calls(x.roll(1, 0), n)[1:] for n in range(1, TILE + 1)]
    alike = [torch.equal(a[:-1], b) for a, b in zip(found, moved, strict=True)]
    ranges = [(1, 1)]
    for most in range(2, TILE + 1):
        fewest = most
        while fewest and alike[fewest - 1] and _equal(found[fewest - 1], found[most - 1]):
            fewest -= 1
        if fewest < min(most, FILLED):
            ranges.append((fewest + 1, most))
    return max(ranges, key=lambda sizes: sizes[1])


def _equal(a: Tensor, b: Tensor) -> bool:
    """As far as both go."""
    n = min(len(a), len(b))
    return torch.equal(a[:n], b[:n])


def grouped_mm_takes(*factors: Tensor) -> bool:
    """torch 2.13's grouped_mm wants rows of a multiple of 16 bytes, forward and backward.

    factors: rows [slots, width] or the matrices of all experts [experts, out, in].
    """
    dtype, device = factors[0].dtype, factors[0].device.type
    dtypes = (torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,)
    sizes = {size for t in factors for size in (t.shape[1:] if t.dim() > 2 else t.shape[-1:])}
    return dtype in dtypes and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def _suits_onednn(x: Tensor) -> bool:
    """float32 on a CPU that oneDNN was made for. Torch has no derivative of this call."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and _HAS_ONEDNN
        and not torch.is_grad_enabled()
    )


_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


_X86 = platform.machine() in ("x86_64", "AMD64")
_BFLOAT16_IS_SLOW = _X86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
"""A CPU without AVX-512: 256 rows by 512 x 512 take 15.0 ms on a core, and 1.6 in float32."""


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
