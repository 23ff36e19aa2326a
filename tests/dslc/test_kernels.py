"""`dslc kernels`, and `dslc build --target`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.triton.compiled import HEADINGS
from backends.triton.target import TARGETS
from dslc.options import TargetName
from tests.support.command import Run
from tests.support.places import ROOT

TINY = str(ROOT / "specs/deepseek_v3_tiny.yaml")


@pytest.mark.slow
def test_the_table_and_what_is_saved(dslc: Run, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    asked = ("--target", "sm_90", "--file", "norm", "--save", str(folder))
    outcome = dslc("kernels", TINY, *asked)
    assert outcome.status == 0, outcome.err
    head, *rows = outcome.out.splitlines()
    assert head.split("  ")[0] == "kernel" and all(name in head for name in HEADINGS)
    assert rows[0].startswith("rms_norm n32 m1 ") and "us (memory)" in rows[0]
    kept = {path.name.split("-")[-1] for path in folder.iterdir()}
    assert {"norm.py", "rms_norm_kernel.ptx", "rms_norm_kernel.sass"} <= kept


@pytest.mark.slow
def test_as_json(dslc: Run) -> None:
    outcome = dslc("kernels", TINY, "--target", "gfx942", "--file", "norm", "--format", "json")
    result = json.loads(outcome.out)
    assert result["ok"] and result["target"] == "gfx942"
    assert all(row["metrics"]["spilled_bytes"] == 0 for row in result["kernels"])


@pytest.mark.slow
def test_a_file_that_the_model_does_not_have(dslc: Run) -> None:
    outcome = dslc("kernels", TINY, "--target", "sm_90", "--file", "nomr")
    assert outcome.status == 1
    assert "E691" in outcome.err and "did you mean `norm`?" in outcome.err


def test_the_targets_of_the_command_line_are_those_that_there_are() -> None:
    assert [target.value for target in TargetName] == list(TARGETS)


def test_a_target_that_there_is_not(dslc: Run) -> None:
    outcome = dslc("kernels", TINY, "--target", "sm_80")
    assert outcome.status == 2 and "sm_90" in outcome.err


def test_without_triton_it_says_what_to_install(dslc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = dslc("kernels", TINY, "--target", "sm_90")
    assert outcome.status == 1
    assert "E605" in outcome.err and "pip install triton==3.7.1" in outcome.err


@pytest.mark.slow
def test_a_build_for_a_target_says_so(dslc: Run, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    assert dslc("build", TINY, "--target", "sm_100", "-o", str(out)).status == 0
    text = (out / "kernels/__init__.py").read_text()
    assert "in a build for sm_100" in text
    assert "from .kernels import F" in (out / "model.py").read_text()
    # The same again changes nothing; without a target the folder goes.
    assert "up to date" in dslc("build", TINY, "--target", "sm_100", "-o", str(out)).out
    assert dslc("build", TINY, "-o", str(out)).status == 0
    assert not (out / "kernels").exists()
