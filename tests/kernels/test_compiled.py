"""Every kernel that a build can choose, compiled for GPUs that are not there, and its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from backends.build import build
from backends.triton.checks import violations
from backends.triton.compiled import compile_kernels, tile
from backends.triton.kernel import KernelFile
from backends.triton.launches import Row
from backends.triton.target import TARGETS
from dsl.load import load
from tests.support.golden import Golden
from tests.support.kernels import COMPILED, FILES, KernelLoader, files_of, package_of
from tests.support.places import ROOT


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Callable[[str, str], list[Row]]:
    """The kernels of a spec for a target: of those files that the tests of this run ask for."""
    callspecs = (getattr(item, "callspec", None) for item in request.session.items)
    asked = {one.params["name"] for one in callspecs if one and "name" in one.params}

    @cache
    def rows(spec: str, target: str) -> list[Row]:
        files = [file for file in files_of(spec, target) if file.name in asked]
        return compile_kernels(files, package_of(spec, target), TARGETS[target])

    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "target"), COMPILED)
@pytest.mark.parametrize("name", FILES)
def test_kernels_keep_the_rules(
    name: str, spec: str, target: str, compiled: Callable[[str, str], list[Row]], golden: Golden
) -> None:
    gpu, files = TARGETS[target], [one for one in files_of(spec, target) if one.name == name]
    rows = [row for row in compiled(spec, target) if row["file"] == f"{name}.py"]
    assert bool(rows) == any(file.cases for file in files)
    broken = [
        f"{row['kernel']} {tile(row.get('constants', {}))} ({row['cases'][0]['name']}): {text}"
        for row in rows
        for text in violations(row, gpu)
    ]
    assert not broken, "\n".join(broken)
    for file in files:
        if file.name != "cross_entropy":  # whose products are torch's
            wanted = {case.name for case in file.cases if case.bound_by != "memory"}
            assert wanted <= {
                c["name"] for row in rows if row["metrics"]["matrix"] for c in row["cases"]
            }
        golden(f"kernels/{spec}.{target}.{name}.json", record(file, rows))


def record(file: KernelFile, rows: list[Row]) -> str:
    """What a review should see change: the file that was compiled by its hash, a line a kernel."""
    lines = [{"file": f"{file.name}.py", "sha256": sha256(file)}, *map(_line, rows)]
    return "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n"


def sha256(file: KernelFile) -> str:
    return hashlib.sha256(file.text.encode()).hexdigest()


def _line(row: Row) -> dict[str, Any]:
    shown = ("registers", "spilled_bytes", "shared", "occupancy", "instructions", "matrix", "hot")
    return {
        "kernel": row["kernel"],
        "case": row["cases"][0]["name"],
        "cases": len(row["cases"]),
        "tile": tile(row["constants"]),
        "warps": row["warps"],
        "stages": row["stages"],
        **{name: row["metrics"][name] for name in shown},
    }


def test_one_file_is_interpreted_compiled_and_shipped(
    kernels: KernelLoader, tmp_path: Path
) -> None:
    """By its hash: in the folder of a build, in its manifest, in `kernels.json`, in this suite."""
    build(load(ROOT / "specs/deepseek_v3_tiny.yaml"), tmp_path / "tiny", target=TARGETS["sm_90"])
    outputs = json.loads((tmp_path / "tiny/manifest.json").read_text())["outputs"]
    listed = json.loads((tmp_path / "tiny/kernels/kernels.json").read_text())["files"]
    compiled = package_of("deepseek_v3_tiny", "sm_90")
    assert listed
    for file in files_of("deepseek_v3_tiny", "sm_90"):
        interpreted = Path(str(kernels(file.name, "deepseek_v3_tiny", "sm_90").__file__))
        texts = {interpreted.read_text(), compiled[f"kernels/{file.name}.py"], file.text}
        assert len(texts) == 1
        assert outputs[f"kernels/{file.name}.py"] == sha256(file)
        assert {"name": f"{file.name}.py", "sha256": sha256(file)}.items() <= next(
            one.items() for one in listed if one["name"] == f"{file.name}.py"
        )
