"""The kernels of a package as compiled code: run for all of its files, told as a table."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backends.triton.kernel import KernelFile, write
from backends.triton.launches import Row
from backends.triton.target import Target


class CompilerFailed(Exception):
    """The process that compiles ended without a result; the message is what it said last."""


def compile_kernels(
    files: Sequence[KernelFile],
    texts: Mapping[str, str],
    target: Target,
    save: Path | None = None,
) -> list[Row]:
    """Every kernel that the cases of `files` launch; libraries have none. `texts` is what
    `kernels_package` made.

    With `save`, the sources are kept in that folder, with PTX and SASS of each kernel beside them.
    Raises CompilerFailed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save or Path(temporary)
        write(texts, folder)
        own = [file for file in files if not file.library]
        shares = _shares(own, os.cpu_count() or 1)
        with ThreadPoolExecutor(len(shares) or 1) as pool:
            parts = pool.map(lambda names: _compile(folder, target, names, bool(save)), shares)
            rows = [row for part in parts for row in part]
    order = [f"{file.name}.py" for file in files]
    return sorted(rows, key=lambda row: order.index(row["file"]))


def _shares(files: Sequence[KernelFile], processes: int) -> list[list[str]]:
    """Names of files for each process, with cases as evenly as they come: to start one, and to load
    Triton and torch, takes as long as some ten kernels."""
    shares: list[list[str]] = [[] for _ in range(min(processes, len(files)))]
    cases = [0] * len(shares)
    for file in sorted(files, key=lambda file: -len(file.cases)):
        least = cases.index(min(cases))
        shares[least].append(f"{file.name}.py")
        cases[least] += len(file.cases)
    return shares


def _compile(folder: Path, target: Target, names: Sequence[str], save: bool) -> list[Row]:
    # Triton that interprets cannot compile; the caller may be a process that interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "backends.triton.launches", str(folder), target.name, *names]
    if save:
        command.append("--save")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines() or ["it said nothing"]
        raise CompilerFailed(f"{', '.join(names)}: {last[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


HEADINGS = (
    "kernel",
    "tile",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared",
    "programs/SM",
    "matrix instruction",
    "access",
    "hot loop",
    "floor",
)


def table(rows: Sequence[Row], target: Target) -> list[list[str]]:
    """A line for each kernel and case, under `HEADINGS`."""
    return [_line(row, case, target) for row in rows for case in row["cases"]]


def _line(row: Row, case: Mapping[str, Any], target: Target) -> list[str]:
    if "error" in row:
        return [case["name"], row["error"], *[""] * (len(HEADINGS) - 2)]
    found, name = row["metrics"], case["name"]
    if row["kernel"] != f"{case['function']}_kernel":
        name = f"{name}: {row['kernel'].removesuffix('_kernel')}"
    return [
        name,
        tile(row["constants"]),
        str(row["warps"]),
        str(row["stages"]),
        str(found["registers"]),
        str(found["spilled_bytes"]),
        f"{found['shared']:,}",
        str(found["occupancy"]),
        ", ".join(f"{n} {name}" for name, n in found["matrix"].items()),
        f"{found['load_bits']}/{found['store_bits']}" + (" bulk" if found["bulk_copies"] else ""),
        str(found["hot"]),
        "{:,.1f} us ({})".format(*floor(case, target)),
    ]


def tile(constants: Mapping[str, Any]) -> str:
    """The sizes that a kernel was cut by: `128x128x128`."""
    sizes = [constants[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if n in constants]
    sizes = sizes or [constants[n] for n in ("ROWS", "BLOCK") if n in constants]
    return "x".join(map(str, sizes))


def floor(case: Mapping[str, Any], target: Target) -> tuple[float, str]:
    """Microseconds below which the target's published peaks do not let a case come, and what bounds
    it: not a measurement."""
    by_memory = 1e6 * case.get("bytes", 0) / target.bandwidth
    by_unit = 1e6 * case.get("flops", 0) / target.flops.get(case["bound_by"], math.inf)
    return max((by_memory, "memory"), (by_unit, case["bound_by"]), key=lambda bound: bound[0])
