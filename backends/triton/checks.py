"""What every kernel that is shipped must show without a GPU, and what one that fails is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backends.triton.target import Target

TENSOR_MEMORY = 512
"""Columns of a multiprocessor's tensor memory (sm_100). A kernel that asks for more is compiled
without a word to one whose whole body is a trap."""

Row = Mapping[str, Any]


def violations(row: Row, target: Target) -> list[str]:
    """The rules that a compiled kernel breaks; `row` is one line of `backends.triton.launches`."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    return [*_fits(row, target), *_is_whole(row), *_uses_the_right_unit(row, target)]


def _fits(row: Row, target: Target) -> Iterator[str]:
    found = row["metrics"]
    if found["shared"] > target.shared_bytes:
        yield f"{found['shared']} bytes of shared memory, {target.shared_bytes} is the most"
    if found["tensor_memory"] > TENSOR_MEMORY:
        yield f"{found['tensor_memory']} columns of tensor memory, {TENSOR_MEMORY} is the most"
    threads = row["warps"] * target.warp_size
    if found["registers"] * threads > target.registers:
        yield f"{found['registers']} registers for each of {threads} threads are too many"
    spilled = found["spilled_bytes"] or found["stack_bytes"] or found["local_accesses"]
    if spilled:
        yield (
            f"registers spill: {found['spilled_bytes']} bytes, a stack of {found['stack_bytes']}, "
            f"{found['local_accesses']} accesses to local memory"
        )


def _is_whole(row: Row) -> Iterator[str]:
    found = row["metrics"]
    if found["traps"]:
        yield "its body is a trap"
    if not found["store_bits"] and not found["bulk_copies"]:
        yield "it stores nothing"
    if found["float_atomics"]:
        yield f"{found['float_atomics']} float atomics: sums would depend on the order of programs"


def _uses_the_right_unit(row: Row, target: Target) -> Iterator[str]:
    found, case = row["metrics"], row["cases"][0]
    bound_by = case["bound_by"]
    if bound_by == "memory" or not _multiplies(row):
        access = case["access"] if _is_main(row) or row["kernel"] == case.get("main") else 0
        for name in ("load", "store"):
            if found[f"{name}_bits"] < access and not found["bulk_copies"]:
                yield f"its widest {name} has {found[f'{name}_bits']} bits, {access} expected"
        return
    wanted = MATRIX[target.name][bound_by]
    if not any(wanted in name for name in found["matrix"]):
        yield f"no {wanted}, but {', '.join(found['matrix']) or 'no matrix instruction'}"
    if target.name == "sm_90" and "HMMA" in found["matrix"]:
        yield "it multiplies by mma.sync, at half of the speed of wgmma"
    if target.backend == "cuda" and row["stages"] < 2 and not found["bulk_copies"]:
        yield "nothing is loaded ahead"
    if target.name == "sm_90":
        yield from _overlaps(row, target)
    if bound_by == "fp8" and target.name == "sm_90":
        yield from _promotes(row, target)


def _overlaps(row: Row, target: Target) -> Iterator[str]:
    """Loads go on while tensor cores work, and one product is issued while another is under way."""
    found = row["metrics"]
    if found["serialized"]:
        yield "each of its products waits for the one before it: ptxas serialized wgmma"
    # The loop of two stages loads the next turn when it has multiplied, and waits for it.
    fits = found["shared"] * (row["stages"] + 1) // row["stages"] <= target.shared_bytes
    if found["async_copies"] and not found["copies_ahead"] and found["occupancy"] == 1 and fits:
        yield "nothing is loaded while it multiplies, and another stage has room"


MATRIX = {
    "sm_90": {"fp8": "QGMMA", "bf16": "HGMMA"},
    "sm_100": {"fp8": "UTCQMMA", "bf16": "UTCHMMA"},
    "gfx942": {"fp8": "fp8_fp8", "bf16": "bf16"},
}
"""Part of the name of the instruction that must multiply."""


def _multiplies(row: Row) -> bool:
    """A launcher for matrix units may launch kernels beside that do not multiply."""
    return bool(row["metrics"]["matrix"]) or _is_main(row)


def _is_main(row: Row) -> bool:
    """Whether this is the kernel that a case is about, by name: `rms_norm`, `rms_norm_kernel`."""
    return str(row["kernel"]).removesuffix("_kernel") == str(row["cases"][0]["function"])


def _promotes(row: Row, target: Target) -> Iterator[str]:
    """Each 128 of K the sum must leave the tensor cores, which keep 14 bits of it."""
    constants = row["constants"]
    sizes = [constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    if None in sizes:
        yield "an FP8 product says its tile by BLOCK_M, BLOCK_N and BLOCK_K, to be checked"
        return
    m, n, k = sizes
    least = m * n // (row["warps"] * target.warp_size) * max(1, k // 128)
    if row["metrics"]["promotions"] < least:
        yield f"{row['metrics']['promotions']} float32 sums in the loop, promotion takes {least}"
