"""RMSNorm kernels, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

from runtime import functional
from tests.kernels.conftest import Kernels


@pytest.mark.parametrize(("rows", "hidden"), [(0, 512), (1, 7168), (5, 7168), (17, 512), (3, 1536)])
def test_rms_norm(kernels: Kernels, target: str, rows: int, hidden: int) -> None:
    norm = kernels("norm", "deepseek_v3", target)
    generator = torch.Generator().manual_seed(rows)
    # Rows of a wider tensor, as `split` leaves them; what lies between them is poison.
    wide = torch.full((rows, hidden + 64), torch.nan, dtype=torch.bfloat16)
    wide[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    x, weight = wide[:, :hidden], torch.randn(hidden, generator=generator).bfloat16()
    y = norm.rms_norm(x, weight, eps=1e-6)
    expected = functional.rms_norm(x, weight, eps=1e-6)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    # Sums that differ in float32 may round to the bfloat16 beside, at most 2^-7 away.
    assert torch.allclose(y.float(), expected.float(), rtol=2**-7, atol=0)
    assert torch.equal(y, norm.rms_norm(x, weight, eps=1e-6))
