"""Which kernel multiplies matrices: all give the same product up to rounding, not in the same time.

Where torch has a choice on the CPU, its matmul takes MKL for float32, and MKL keeps to AVX2 on
processors that are not Intel's: oneDNN takes half of the time there (2048 x 256 by 256 x 96: 0.40
ms against 0.97 on one core of a Zen 5), and for bfloat16 torch takes it anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor

ONEDNN_ROWS = 8
"""From so many rows on oneDNN is ahead; for fewer, the time is that of reading the weight."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` for x [..., in] and weight [out, in], of any strides: [..., out]."""
    if x.numel() >= ONEDNN_ROWS * x.shape[-1] > 0 and _suits_onednn(x):
        return _onednn(x, weight)
    return torch_f.linear(x, weight)


def grouped_product(x: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """`x W_e^T` for the rows of each expert e: x [slots, in], weight [experts, out, in].

    `ends` int32 [experts] says where each expert's rows end.
    """
    if grouped_mm_takes(x, weight) and not _suits_onednn(x):
        return torch_f.grouped_mm(x, weight.transpose(-1, -2), offs=ends)
    if torch.is_grad_enabled():
        parts = zip(x.split(counts(ends)), weight.unbind(), strict=True)
        return torch.cat([torch_f.linear(rows, matrix) for rows, matrix in parts])
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = product(x[start:end], weight[expert])
        start = end
    return out


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`a_e^T b_e` over the rows of each expert, zeros where it has none: [experts, m, n].

    a [slots, m], b [slots, n]; no gradient follows from it.
    """
    if grouped_mm_takes(a, b) and not _suits_onednn(a):
        return torch_f.grouped_mm(a.t(), b, offs=ends)
    out = a.new_empty(len(ends), a.shape[1], b.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        out[expert] = product(a[start:end].t(), b[start:end].t())
        start = end
    return out


def grouped_mm_takes(*factors: Tensor) -> bool:
    """torch 2.13's grouped_mm wants rows of a multiple of 16 bytes, forward and backward.

    factors: rows [slots, width] or the matrices of all experts [experts, out, in].
    """
    dtype, device = factors[0].dtype, factors[0].device.type
    dtypes = (torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,)
    sizes = {size for t in factors for size in (t.shape[1:] if t.dim() > 2 else t.shape[-1:])}
    return dtype in dtypes and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def counts(ends: Tensor) -> list[int]:
    """How many rows each expert has."""
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


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
