"""E5M6: activations saved in 12 bits per element, with a scale for each run of 128 in a row.

DeepSeek-V3 saves the inputs of the projection after attention so (report, section 3.3.3). A number
is a float16 with four bits fewer: a sign, five exponent bits (bias 15), six fraction bits; the
largest is 65024. Two values a, b take three bytes: the low eight bits of a; its high four and,
above them, the low four of b; the high eight of b.

Every bit is defined: amax is the largest magnitude of a run in float32, at least 1e-4; its scale is
the power of two 2^ceil(log2(amax / 65024)); x / scale is rounded to nearest, ties to even. A run
with an infinity or a NaN is read as NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from . import fp8

LARGEST = 65024.0
FRACTION, LEAST_EXPONENT = 6, -14
"""Mantissa bits of a normal number, and the exponent of the least of them."""


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., n] as bytes uint8 [.., 3 ceil(n / 2)] and scales float32 [.., runs of 128]."""
    x = fp8.without_gradient(x).float()
    n = x.shape[-1]
    runs = fp8.pad_runs(x, -1).unflatten(-1, (-1, fp8.RUN))
    s = fp8.scale_of(runs.abs().amax(-1), "ue8m0", LARGEST)
    y = x / fp8.spread_scales(s, n)
    # The last place of y, which that of the least normal number bounds from below.
    exponent = torch.frexp(y).exponent.clamp(min=LEAST_EXPONENT + 1)
    unit = torch.ldexp(torch.ones_like(y), exponent - 1 - FRACTION)
    codes = ((y / unit).round() * unit).half().view(torch.int16) >> 4 & 0xFFF
    a, b = torch_f.pad(codes, (0, n % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    packed = torch.stack([a & 0xFF, a >> 8 | (b & 0xF) << 4, b >> 4], -1)
    return packed.flatten(-2).to(torch.uint8), s


def unpack(packed: Tensor, s: Tensor, n: int, *, dtype: torch.dtype) -> Tensor:
    """What `pack` gave of rows of n elements: [.., n]."""
    low, middle, high = packed.to(torch.int16).unflatten(-1, (-1, 3)).unbind(-1)
    codes = torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], -1)
    values = (codes.flatten(-2)[..., :n] << 4).view(torch.float16).float()
    return (values * fp8.spread_scales(s, n)).to(dtype)
