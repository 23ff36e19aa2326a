"""Casts to FP8, interpreted: equal to the reference, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.triton.launches import load
from runtime import fp8
from tests.support.kernels import KernelLoader

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SCALES = ("fp32", "ue8m0")
FP8 = ["precision.policy=fp8_blockwise"]


def wild(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16 numbers of very different sizes: zeros of both signs, a row of zeros, tiny and huge
    ones, and in the second row, if there is one, what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(
        8 * torch.randn(*shape, generator=generator)
    )
    x = x.where(torch.rand(*shape, generator=generator) > 0.1, -0.0)
    rows = x.view(-1, shape[-1])
    for row, numbers in zip(
        rows, ([3e38, 1e-40], [math.nan, math.inf, -math.inf], []), strict=False
    ):
        row[: len(numbers)] = torch.tensor(numbers)[: len(row)]
        if not numbers:
            row[:] = 0
    return x.bfloat16()


def same(found: fp8.Quantized, expected: fp8.Quantized) -> None:
    (q, s), (want_q, want_s) = found, expected
    assert (q.shape, q.dtype, s.shape, s.dtype) == (want_q.shape, E4M3, want_s.shape, torch.float32)
    assert torch.equal(s.isnan(), want_s.isnan()) and torch.equal(
        s.nan_to_num(), want_s.nan_to_num()
    )
    bits, want = q.view(torch.uint8), want_q.view(torch.uint8)
    # A NaN has a sign that nobody reads.
    nan = want_q.float().isnan()
    assert torch.equal(nan, q.float().isnan())
    assert torch.equal(bits.masked_fill(nan, 0), want.masked_fill(nan, 0))


E4M3 = torch.float8_e4m3fn


def test_a_scale_that_is_not_rounded_as_a_division_is_found(
    kernels: KernelLoader, tmp_path: Path
) -> None:
    """`/` is approximate on a GPU, and in the interpreter that tests use."""
    text = Path(str(kernels("quantize", "deepseek_v3_tiny", "sm_90", FP8).__file__)).read_text()
    rounded = 's = tl.where(s < float("inf"), tl.fma(tl.fma(s, -448.0, amax), 1 / 448, s), s)'
    assert rounded in text
    plain = "s = amax / 448.0"
    (tmp_path / "approximate.py").write_text(text.replace(rounded, plain))
    x = wild(40, 96)[2:]
    (q, s), (want_q, want_s) = load(tmp_path / "approximate.py").quantize(x), fp8.quantize(x)
    assert not torch.equal(s, want_s)
    assert not torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))


def fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c of float32, rounded once: by an odd last bit of float64 where that is not exact."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    of_c = total - product
    rest = (product - (total - of_c)) + (c - of_c)
    bits = total.view(np.int64)
    even = (rest != 0) & (bits % 2 == 0)
    bits = np.where(even, np.where((rest > 0) == (total > 0), bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)


def test_a_corrected_product_is_the_quotient_by_448() -> None:
    """As `scale_of` divides, of every mantissa: powers of two change nothing."""
    x = np.arange(127 << 23, 128 << 23, dtype=np.int32).view(np.float32)
    inverse = np.full_like(x, 1 / 448)
    near = x * inverse
    corrected = fma(fma(near, np.full_like(x, -448), x), inverse, near)
    assert (corrected == (x.astype(np.float64) / 448).astype(np.float32)).all()
    assert (near != corrected).any()


def test_a_corrected_reciprocal_is_that_of_a_division() -> None:
    """As `divided` has it: for the scale of any bfloat16, whichever neighbour a GPU begins with."""
    amax = (np.arange(127 << 7, 128 << 7, dtype=np.int32) << 16).view(np.float32)
    s = (amax.astype(np.float64) / 448).astype(np.float32)
    exact = (1 / s.astype(np.float64)).astype(np.float32)
    for off in (-2, -1, 0, 1, 2):
        y = (exact.view(np.int32) + off).view(np.float32)
        assert (fma(fma(-s, y, np.ones_like(s)), y, y) == exact).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("shape", "parts"),
    [((0, 256), ()), ((1, 7168), ()), ((2, 3, 130), ()), ((40, 96), ()), ((5, 200), (40, 160))],
)
def test_rows(
    kernels: KernelLoader, vendor: str, shape: tuple[int, ...], parts: tuple[int, ...], scale: str
) -> None:
    x = wild(*shape)
    wide = torch.full((*shape[:-1], shape[-1] + 16), torch.nan, dtype=torch.bfloat16)
    wide[..., : shape[-1]] = x
    x = wide[..., : shape[-1]]  # as `split` leaves it
    quantize = kernels("quantize", "deepseek_v3_tiny", vendor, FP8).quantize
    same(quantize(x, scale, parts), fp8.quantize(x, scale, parts))


ENDS = [None, (0, 0, 0), (130, 130, 131), (128, 255, 255), (0, 1, 129)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("size", [72, 130])
def test_columns(
    kernels: KernelLoader, vendor: str, size: int, ends: Sequence[int] | None, scale: str
) -> None:
    module = kernels("quantize", "deepseek_v3_tiny", vendor, FP8)
    x = wild(ends[-1] if ends else 140, size)
    of = () if ends is None else (torch.tensor(ends, dtype=torch.int32),)
    same(module.quantize_columns(x, *of, scale=scale), fp8.quantize_columns(x, *of, scale=scale))
    both = module.quantize_both(x, *of, scale=scale)
    same(both[:2], fp8.quantize(x, scale))
    same(both[2:], fp8.quantize_columns(x, *of, scale=scale))
    rows = fp8.quantize(x, scale)
    same(module.requantize(*rows, *of, scale=scale), fp8.requantize(*rows, *of, scale=scale))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("shape", "parts"),
    [((128, 256), ()), ((2, 5, 140), ()), ((150, 40), (20, 130)), ((2, 150, 40), (20, 130))],
)
def test_weights(
    kernels: KernelLoader, vendor: str, shape: tuple[int, ...], parts: tuple[int, ...], scale: str
) -> None:
    weight = wild(*shape)
    module = kernels("quantize", "deepseek_v3_tiny", vendor, FP8)
    found = module.quantize_weight(weight, scale, parts)
    same(found, fp8.quantize_weight(weight, scale, parts))


def test_every_code(kernels: KernelLoader, vendor: str) -> None:
    """All numbers of E4M3, those between two of them, and their neighbours in float32."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = codes[codes.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles])
    x = torch.cat([x, x.nextafter(torch.tensor(500.0)), x.nextafter(torch.tensor(-500.0))])
    x = torch.nn.functional.pad(x.clamp(-448, 448), (0, -len(x) % 127))
    # With 448 in each run the scale is 1.
    runs = torch.nn.functional.pad(x.view(-1, 127), (0, 1), value=448.0).view(1, -1)
    quantize = kernels("quantize", "deepseek_v3_tiny", vendor, FP8).quantize
    for scale in SCALES:
        same(quantize(runs, scale), fp8.quantize(runs, scale))


@pytest.mark.parametrize("least", [0, 80])
def test_every_quotient_of_bfloat16(kernels: KernelLoader, vendor: str, least: int) -> None:
    """Each significand divided by the scale of each other one, down to numbers that become zero;
    for large numbers, and for those whose scale is that of 1e-4."""
    significand = torch.arange(128, 256).float()
    largest = significand * 2.0 ** (100 - least * 2)
    powers = 2.0 ** -torch.arange(1, 20).float()
    numbers = (powers[:, None] * significand).flatten() * 2.0 ** (100 - least * 2)
    runs = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    x = torch.cat([largest.view(-1, 1, 1).expand(-1, len(runs), 1), runs.expand(128, -1, -1)], -1)
    x = torch.cat([x, -x]).flatten(1).bfloat16()
    quantize = kernels("quantize", "deepseek_v3_tiny", vendor, FP8).quantize
    same(quantize(x), fp8.quantize(x))


def test_rows_that_lie_far_apart(kernels: KernelLoader) -> None:
    """Beyond 2^31 numbers, in memory that is never touched between them."""
    module = kernels("quantize", "deepseek_v3_tiny", "sm_90", FP8)
    x = torch.empty(2**31 + 1024, dtype=torch.bfloat16).as_strided((2, 256), (2**31, 1))
    x[:] = wild(2, 256)
    same(module.quantize(x), fp8.quantize(x.clone()))
    same(module.quantize_columns(x), fp8.quantize_columns(x.clone()))
    same(module.quantize_weight(x), fp8.quantize_weight(x.clone()))
    experts = x.as_strided((2, 2, 256), (2**31, 256, 1))
    experts[:] = wild(2, 2, 256)
    same(module.quantize_weight(experts), fp8.quantize_weight(experts.clone()))


def test_every_number_is_written_and_always_the_same(
    kernels: KernelLoader, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernels("quantize", "deepseek_v3_tiny", vendor, FP8)
    x, ends = wild(140, 72), torch.tensor([1, 1, 140], dtype=torch.int32)

    def results() -> list[Tensor]:
        rows = module.quantize(x, "ue8m0")
        columns = module.quantize_columns(x, ends), module.requantize(*rows, ends, scale="fp32")
        found = [*rows, *module.quantize_weight(x), *columns[0], *columns[1]]
        return [t.view(torch.uint8) for t in found]

    first, empty = results(), torch.empty

    def poisoned(*size: int, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.view(torch.uint8).fill_(0x7F).view(made.dtype)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("shape", [(3, 5, 128), (7, 300), (0, 96)])
def test_saved_numbers_are_read_back(kernels: KernelLoader, shape: tuple[int, ...]) -> None:
    """What is not finite, too; scales that lie by columns."""
    sets = [*FP8, "train.saved_formats.experts=fp8"]
    q, s = fp8.quantize(wild(*shape), "ue8m0")
    across = s.transpose(-1, -2).contiguous().transpose(-1, -2)
    for target in ("sm_90", "gfx942"):
        module = kernels("quantize", "deepseek_v3_tiny", target, sets)
        for dtype in (torch.bfloat16, torch.float32):
            found = module.dequantize(q, across, dtype=dtype)
            expected = fp8.dequantize(q, s, dtype=dtype)
            assert found.dtype == dtype and torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
