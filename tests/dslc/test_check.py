"""`dslc check`: one run shows every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dslc.specs import shipped
from tests.support.command import Run

SPECS = ("deepseek_v3", "deepseek_v3_mini", "deepseek_v3_tiny", "deepseek_v2_lite")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_right_spec(dslc: Run, name: str) -> None:
    outcome = dslc("check", shipped()[name])
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"{name}: no errors found\n"
    assert json.loads(dslc("check", shipped()[name], "--format", "json").out)["ok"] is True


def test_every_mistake_at_once_with_place_and_caret(dslc: Run, wrong: Path) -> None:
    outcome = dslc("check", wrong)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.count("error[E") == 2
    assert outcome.err.endswith("\n2 problems\n")
    assert f"{wrong}:" in outcome.err and "^^^^^^^^" in outcome.err
    assert "did you mean `precision`?" in outcome.err


@pytest.mark.slow
def test_changes_from_the_command_line_are_checked_too(dslc: Run) -> None:
    spec = shipped()["deepseek_v3_tiny"]
    assert dslc("check", spec, "--set", "params.n_routed_experts=32").status == 0
    outcome = dslc("check", spec, "--set", "params.num_experts_per_tok=99")
    assert outcome.status == 1
    assert "99 experts cannot be chosen" in outcome.err and "--set:1:" in outcome.err


def test_an_unknown_variant(dslc: Run) -> None:
    outcome = dslc("check", shipped()["deepseek_v3_tiny"], "--variant", "huge")
    assert outcome.status == 1 and "there is no variant `huge`" in outcome.err
