"""Weights in int8 with a float32 scale for each row: what compiled steps on CPUs can read.

Numbers are w / s, rounded to nearest, ties to even; s is the largest magnitude of a row over 127.
Activations are not quantized: products sum float32 values times int8 values, then multiply by s.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
LEAST_AMAX = 1e-20


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [.., out, in] as int8 [.., out, in] and scales, float32 [.., out, 1]."""
    wide = weight.detach().float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / MOST
    return (wide / scale).round().to(torch.int8), scale
