"""E5M6 against a definition of its own: every number by itself, in Python's float64."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime import e5m6

# Magnitudes by their 11 bits: 5 of exponent (bias 15), 6 of fraction; the highest exponent is that
# of infinity.
MAGNITUDES = [
    (code & 63) / 64 * 2.0**-14 if code < 64 else (1 + (code & 63) / 64) * 2.0 ** ((code >> 6) - 15)
    for code in range(31 << 6)
]


def code_of(value: float) -> int:
    """The 12 bits of the nearest number; of two equally near ones that with an even bit."""
    above = bisect_left(MAGNITUDES, abs(value))
    below = max(above - 1, 0)
    middle = (MAGNITUDES[below] + MAGNITUDES[above]) / 2
    even = below if below % 2 == 0 else above
    code = even if abs(value) == middle else below if abs(value) < middle else above
    return code | (0x800 if math.copysign(1, value) < 0 else 0)


def scale_of(run: Sequence[float]) -> float:
    amax = max([1e-4, *map(abs, run)])
    return 2.0 ** math.ceil(math.log2(amax / 65024))


def read_back(x: Tensor) -> Tensor:
    return e5m6.unpack(*e5m6.pack(x), x.shape[-1], dtype=torch.float32)


def some(largest: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-largest, largest, width=32), min_size=1, max_size=6)


@given(some(2.0**13), some(2.0**-10), st.integers(-100, 100))
def test_each_number_is_the_nearest_one(first: list[float], small: list[float], by: int) -> None:
    """The numbers of two runs, the second of which may be short."""
    numbers = [*first, *small]
    x = torch.tensor([*numbers, *[0.0] * (128 - len(numbers)), *small]) * 2.0**by
    packed, s = e5m6.pack(x)
    assert packed.dtype == torch.uint8 and len(packed) == 3 * ((len(x) + 1) // 2)
    found = e5m6.unpack(packed, s, len(x), dtype=torch.float32)
    for run, scale in ((slice(0, 128), s[0]), (slice(128, None), s[1])):
        values = x[run].tolist()
        assert scale == scale_of(values)
        codes = [code_of(v / scale.item()) for v in values]
        signed = [math.copysign(MAGNITUDES[c & 0x7FF], 0.5 - (c >> 11)) for c in codes]
        assert found[run].tolist() == [v * scale.item() for v in signed]
        # Half of the last of seven bits, and half of the least number there is.
        normal = x[run].abs() >= scale * 2.0**-14
        error = (found[run].double() - x[run].double()).abs()
        assert (
            error <= torch.where(normal, x[run].abs().double() * 2.0**-7, scale * 2.0**-21)
        ).all()


@given(st.lists(st.integers(0, len(MAGNITUDES) - 1), min_size=1, max_size=9), st.integers(-90, 90))
def test_numbers_that_there_are_stay(codes: list[int], by: int) -> None:
    x = torch.tensor([MAGNITUDES[code] * (-1) ** code for code in codes]) * 2.0**by
    if x.abs().max() >= 1e-4:
        assert torch.equal(read_back(x), x)


def test_two_numbers_are_three_bytes() -> None:
    """1 and -2 times 2^14, the inverse of the scale: 0x740 and 0xF80."""
    packed, s = e5m6.pack(torch.tensor([[1.0, -2.0]]))
    assert (packed.tolist(), s.tolist()) == ([[0x40, 0x07, 0xF8]], [[2.0**-14]])


def test_bfloat16_and_shapes_stay() -> None:
    x = torch.randn(2, 3, 5, 133, generator=torch.manual_seed(0)).bfloat16()
    packed, s = e5m6.pack(x)
    assert (packed.shape, s.shape) == ((2, 3, 5, 201), (2, 3, 5, 2))
    found = e5m6.unpack(packed, s, 133, dtype=torch.bfloat16)
    assert torch.equal(found.float(), read_back(x)) and not torch.equal(found, x)


def test_what_is_not_finite_shows_in_its_run() -> None:
    for value in (math.inf, -math.inf, math.nan):
        x = torch.ones(256)
        x[5] = value
        found = read_back(x)
        assert found[:128].isnan().all() and (found[128:] == 1).all()
