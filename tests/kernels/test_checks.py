"""The rules of compiled kernels, on what a compiler could say."""

from __future__ import annotations

from typing import Any

import pytest

from backends.triton.checks import violations
from backends.triton.metrics import Instruction, _copies_ahead
from backends.triton.target import TARGETS

GOOD = {
    "shared": 196608, "tensor_memory": 0, "registers": 168, "spilled_bytes": 0, "stack_bytes": 0,
    "local_accesses": 0, "traps": 0, "store_bits": 128, "load_bits": 32, "bulk_copies": 0,
    "float_atomics": 0, "matrix": {"HGMMA": 8}, "serialized": 0, "occupancy": 1,
    "async_copies": 32, "copies_ahead": 4,
}  # fmt: skip


def row(stages: int = 3, **found: Any) -> dict[str, Any]:
    case = {"function": "linear", "bound_by": "bf16", "access": 128}
    return {
        "kernel": "linear_kernel", "cases": [case], "constants": {}, "warps": 8, "stages": stages,
        "metrics": {**GOOD, **found},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, ""),
        ({"serialized": 1}, "each of its products waits for the one before it"),
        (
            {"stages": 2, "shared": 131072, "copies_ahead": 0},
            "nothing is loaded while it multiplies",
        ),
        # Another program multiplies meanwhile; there is no room for a third stage.
        ({"stages": 2, "shared": 98304, "copies_ahead": 0, "occupancy": 2}, ""),
        ({"stages": 2, "shared": 221184, "copies_ahead": 0}, ""),
    ],
)
def test_what_overlaps(found: dict[str, Any], told: str) -> None:
    broken = violations(row(**found), TARGETS["sm_90"])
    assert len(broken) == bool(told) and all(told in text for text in broken)


def test_copies_ahead_are_those_that_a_turn_does_not_wait_for() -> None:
    copy, multiply = Instruction(16, "LDGSTS.E.128", ""), Instruction(32, "QGMMA", "")
    for rest, ahead in ((" SB0, 0x0 ;", 0), (" SB0, 0x4 ;", 4)):
        assert _copies_ahead([Instruction(0, "DEPBAR.LE", rest), multiply, copy]) == ahead
    assert _copies_ahead([multiply]) == 0
