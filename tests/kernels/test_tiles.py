"""How tiles are chosen: by what the cost model says, unless a GPU said otherwise."""

from __future__ import annotations

import pytest

from backends.triton.target import TARGETS
from backends.triton.tiles import BF16, BUCKETS, FP8, FP8_GROUPED, Gemm, steps, tuning_key
from backends.triton.tuning_table import TuningTable

CANDIDATES = {"fp8": FP8, "fp8_grouped": FP8_GROUPED, "bf16": BF16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CANDIDATES)
def test_few_rows_have_small_tiles_and_many_large_ones(name: str, target: str) -> None:
    gpu, size, tiles = TARGETS[target], 2 if name == "bf16" else 1, CANDIDATES[name][target]
    for columns in (512, 2112, 7168):
        found = steps(name, tiles, Gemm(0, columns, 7168, size), gpu, TuningTable())
        limits = [rows for rows, _ in found]
        assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1]))
        assert found[0][1].rows == 16
        assert found[-1][1].rows == max(tile.rows for tile in tiles)


def test_few_slots_of_many_experts_have_small_tiles() -> None:
    """As many tiles as experts with a slot, whatever the height: a higher one is empty work."""
    gpu, product = TARGETS["sm_90"], Gemm(0, 4096, 7168, 1, experts=256)
    found = dict(steps("grouped", FP8["sm_90"], product, gpu, TuningTable()))
    assert next(iter(found.values())).rows == 16
    assert found[None].rows == 128


def test_what_a_gpu_said_is_taken() -> None:
    gpu, product = TARGETS["sm_90"], Gemm(0, 7168, 2048, 1)
    measured = TuningTable({"fp8_linear n7168 m16": "64x128"})
    found = steps("fp8_linear", FP8["sm_90"], product, gpu, measured)
    assert (found[0][0], found[0][1].name) == (16, "64x128")
    assert measured.asked.keys() == {f"fp8_linear n7168 m{rows}" for rows in BUCKETS}
    assert (
        tuning_key("fp8_linear", 7168, 3)
        == tuning_key("fp8_linear", 7168, 16)
        == "fp8_linear n7168 m16"
    )
    assert tuning_key("fp8_linear", 7168, 10**6) == f"fp8_linear n7168 m{BUCKETS[-1]}"
