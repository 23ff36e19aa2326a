"""The choice of a GEMM: all give the same product up to rounding, at different speeds.

Where torch has a choice on the CPU, its matmul takes MKL for float32, and MKL keeps to AVX2 on
processors that are not Intel's: oneDNN takes half of the time there (2048 x 256 by 256 x 96: 0.40
ms against 0.97 on one core of a Zen 5), and for bfloat16 torch takes it anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as torch_f
from torch import Tensor

FEW = 8
"""Up to this many rows, reading the weight takes the time: all kernels are equally fast."""

LARGE = 2**19
"""With this many numbers, oneDNN also reads the weight faster (8192 x 512: 0.73 ms, MKL 1.13)."""

BUCKET = 32
"""oneDNN makes a kernel for each new number of rows, which takes as long as to multiply some 500
rows of 512 by 256. Routing brings new numbers with every batch; rounded up, they are few."""


TILE = 32
"""Rows of a call where no row's bits may depend on how many there are."""

_invariant = False


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it, a row's bits do not depend on the other rows of a call, nor on how many."""
    global _invariant
    before, _invariant = _invariant, True
    try:
        yield
    finally:
        _invariant = before


def is_batch_invariant() -> bool:
    return _invariant


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` for x [..., in] and weight [out, in], of any strides: [..., out]."""
    if _invariant:
        return _row_invariant(x, weight)
    many = x.numel() > FEW * x.shape[-1] or weight.numel() >= LARGE
    if many and x.numel() and _suits_onednn(x):
        return _onednn(x, weight)
    return torch_f.linear(x, weight)


def grouped_product(x: Tensor, offs: Tensor, weight: Tensor) -> Tensor:
    """`x W_e^T` for the rows of each expert e: x [slots, in], weight [experts, out, in].

    `offs` int32 [experts] says where each expert's rows end.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        out = x.new_empty(len(x), weight.shape[1])
        if _invariant:
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
    return torch.cat([torch_f.linear(rows, matrix) for rows, matrix in parts])


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
    """`product` in calls of at most TILE rows, of which one has the bits of all."""
    rows = x.reshape(-1, x.shape[-1])
    key = (tuple(weight.shape), weight.stride(), weight.dtype, weight.device.type)
    few = _FEWEST.get(key)
    if few is None:
        few = _FEWEST[key] = _fewest_rows(weight)
    multiply = _multiply(x)
    out = by_tiles(rows, lambda tile: multiply(tile, weight), few)
    return out.view(*x.shape[:-1], len(weight))


def by_tiles(x: Tensor, compute: Callable[[Tensor], Tensor], fewest: int = TILE) -> Tensor:
    """What `compute` makes of rows x [n, ...], in calls of TILE rows and a last one of fewer, but
    not fewer than `fewest`: zeros fill up."""
    rows = x.shape[0]
    if rows > TILE:
        return torch.cat([by_tiles(tile, compute, fewest) for tile in x.split(TILE)])
    if rows >= fewest:
        return compute(x)
    filled = x.new_zeros(fewest, *x.shape[1:])
    filled[:rows] = x
    return compute(filled)[:rows]


_FEWEST: dict[tuple[object, ...], int] = {}
"""For a kind of weight, from how many rows on a row has the bits that it has in a whole tile."""


def _fewest_rows(weight: Tensor) -> int:
    """By trying every number of rows. oneDNN computes one row in another way than several, and all
    numbers from two to TILE alike; where that does not hold, only whole tiles are computed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TILE, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    multiply = _multiply(x)
    whole = multiply(x, weight)
    agree = [torch.equal(multiply(x[:n], weight), whole[:n]) for n in range(1, TILE + 1)]
    return next(n for n in range(1, TILE + 1) if all(agree[n - 1 :]))


def _multiply(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return _onednn if _suits_onednn(x) else torch_f.linear


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


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
