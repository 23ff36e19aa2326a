"""`dslc build` as people call it: one process, no torch, the same bytes, nothing destroyed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dslc.specs import shipped
from tests.support.command import Run
from tests.support.places import ROOT

TINY = shipped()["deepseek_v3_tiny"]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_it_writes_the_package_and_says_where(dslc: Run) -> None:
    outcome = dslc("build", TINY)
    assert (outcome.status, outcome.err) == (0, "")
    assert "wrote build/deepseek_v3_tiny: " in outcome.out
    written = {path.name for path in Path("build/deepseek_v3_tiny").iterdir()}
    assert {
        "__init__.py",
        "model.py",
        "runtime",
        "graph",
        "report.html",
        "manifest.json",
    } <= written
    assert os.listdir("build") == ["deepseek_v3_tiny"]


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(dslc: Run) -> None:
    for out in ("a", "b"):
        assert dslc("build", TINY, "-o", out).status == 0
    assert "a is up to date" in dslc("build", TINY, "-o", "a").out
    assert digests(Path("a")) == digests(Path("b"))


@pytest.mark.slow
def test_json_says_where(dslc: Run) -> None:
    told = json.loads(dslc("build", TINY, "-o", "x", "--format", "json").out)
    assert told["ok"] is True and told["folder"] == "x"
    assert set(told["files"]) == set(digests(Path("x")))


@pytest.mark.slow
def test_a_folder_of_someone_else_survives(dslc: Run) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious", encoding="utf-8")
    outcome = dslc("build", TINY, "-o", "mine")
    assert outcome.status == 1 and "mine" in outcome.err
    assert Path("mine/thesis.txt").read_text(encoding="utf-8") == "precious"
    assert os.listdir(".") == ["mine"]


def test_a_wrong_spec_writes_nothing(dslc: Run, wrong: Path) -> None:
    assert dslc("build", wrong).status == 1
    assert os.listdir(".") == [wrong.name]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(dslc: Run) -> None:
    Path("file").write_text("", encoding="utf-8")
    outcome = dslc("build", TINY, "-o", "file/below")
    assert outcome.status == 1 and "file" in outcome.err


@pytest.mark.slow
def test_the_whole_v3_builds_without_torch(tmp_path: Path) -> None:
    program = "import sys; from dslc.cli import run; print(run()); print(*sys.modules)"
    run = [
        sys.executable,
        "-c",
        program,
        "build",
        "specs/deepseek_v3.yaml",
        "-o",
        str(tmp_path / "v3"),
    ]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert done.stdout.splitlines()[-2] == "0"
    assert "backends" in loaded
    assert not loaded & {"torch", "numpy", "networkx", "sympy"}


@pytest.mark.slow
def test_it_says_which_attention_no_kernel_serves(dslc: Run) -> None:
    """And makes none that would not be called; the layer without a window has its own."""
    spec = shipped()["local_global_mini"]
    outcome = dslc("build", spec, "--variant", "mla", "--target", "sm_90")
    assert outcome.status == 0
    assert "no kernel serves attention with window (mla.dsl:" in outcome.out
    kernels = Path("build/local_global_mini/kernels")
    assert (kernels / "attention.py").exists() and (kernels / "latent_attention.py").exists()
    assert "F.paged_latent_attention" in (kernels.parent / "model.py").read_text()
    dslc("build", spec, "--variant", "mla", "--target", "sm_90", "--set", "params.window=64")
    assert [file.name for file in kernels.glob("*attention.py")] == ["attention.py"]
    assert "F.paged_latent_attention" not in (kernels.parent / "model.py").read_text()
