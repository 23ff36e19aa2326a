"""In which order tiles are computed, and what programs that run together read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl

from backends.triton.target import TARGETS
from tests.support.kernels import KernelLoader

AT_ONCE = TARGETS["sm_90"].multiprocessors


@triton.jit
def tell(out, tiles_m, tiles_n, place: tl.constexpr):  # type: ignore[no-untyped-def]
    m, n = place(tl.program_id(0), tiles_m, tiles_n)
    tl.store(out + 2 * tl.program_id(0), m)
    tl.store(out + 2 * tl.program_id(0) + 1, n)


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_grouped_linear"])
@pytest.mark.parametrize(("high", "wide"), [(1, 7), (8, 3), (19, 5)])
def test_each_tile_has_one_program(kernels: KernelLoader, name: str, high: int, wide: int) -> None:
    found = torch.full((high * wide, 2), -1, dtype=torch.int32)
    tell[(high * wide,)](found, high, wide, kernels(name, "deepseek_v3").place)
    assert {tuple(pair) for pair in found.tolist()} == {
        (m, n) for m in range(high) for n in range(wide)
    }
    assert found.tolist() == [list(pair) for pair in map(_place(high, wide), range(high * wide))]


def test_programs_that_run_together_share_what_they_read() -> None:
    """The weight gradient of V3's experts, 32 x 56 tiles: 132 programs read 25 to 33 panels of rows
    and columns; row after row they read 58 or 59."""
    placed = _place(32, 56)
    assert max(_panels(placed, 32 * 56)) <= 33
    assert min(_panels(lambda tile: divmod(tile, 56), 32 * 56)) >= 58


def _panels(place: Callable[[int], tuple[int, int]], tiles: int) -> Iterator[int]:
    """Distinct rows and columns of tiles of each wave that is full."""
    for first in range(0, tiles - AT_ONCE + 1, AT_ONCE):
        pairs = [place(tile) for tile in range(first, first + AT_ONCE)]
        yield len({m for m, _ in pairs}) + len({n for _, n in pairs})


def _place(high: int, wide: int) -> Callable[[int], tuple[int, int]]:
    """What `place` of the kernels says, which the test above holds it to."""

    def place(tile: int) -> tuple[int, int]:
        group, inside = divmod(tile, 8 * wide)
        size = min(high - group * 8, 8)
        return group * 8 + inside % size, inside // size

    return place
