"""docs/plan.md: its tables are those of the code, its numbers those of the command."""

from __future__ import annotations

import re

import pytest

from compiler.plan.memory import Kind
from compiler.plan.traffic import PURPOSES
from dsl.schema import Calibration, Cluster, Traffic
from dslc.specs import shipped
from tests.support.command import Run
from tests.support.documents import examples, tables
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_section_of_the_text_is_that_of_v3() -> None:
    (example,) = (e for e in examples(TEXT) if e.language == "yaml")
    assert example.text in shipped()["deepseek_v3"].read_text(encoding="utf-8")


def test_the_tables_name_what_there_is() -> None:
    named = [re.findall(r"`(\w+)`", row[0]) for row in tables(TEXT, "key")]
    assert [name for names in named for name in names] == [
        *Cluster.model_fields,
        *Traffic.model_fields,
    ]
    named = [re.findall(r"`(\w+)`", row[0]) for row in tables(TEXT, "name")]
    assert [name for names in named for name in names] == [*Calibration.model_fields]
    assert [row[0].strip("`") for row in tables(TEXT, "kind")] == [kind.value for kind in Kind]
    assert [row[0].strip("`") for row in tables(TEXT, "purpose")] == list(PURPOSES)


@pytest.mark.slow
def test_the_plan_of_v3_is_what_the_command_prints(dslc: Run) -> None:
    outcome = dslc("plan", shipped()["deepseek_v3"], "--why")
    check_causes(outcome.out)
    printed = outcome.out.split("\n\nHow this is counted:")[0]
    assert outcome.status == 0
    shown = [e.text for e in examples(TEXT) if e.language == "text"]
    assert shown[0] == f"{printed}\n", f"write this into docs/plan.md:\n{printed}"
    outcome = dslc("plan", shipped()["deepseek_v3"], "--serve", "deepseek_day6")
    printed = outcome.out.split("\n\nHow this is counted:")[0]
    assert shown[1:] == [f"{printed}\n"], f"write this into docs/plan.md:\n{printed}"


def check_causes(out: str) -> None:
    """The tables about the predicted step are those of `--why`."""
    causes = tables(TEXT, "of the step of `deepseek_v3`")
    assert len(causes) == 11
    for row in causes:
        assert re.search(" +".join(map(re.escape, filter(None, row))), out), row
    ranks = re.findall(r"^([17]) +([\d. ]+)$", out.partition("s of a step, rank")[2], re.M)
    parts = {rank: numbers.split() for rank, numbers in ranks}
    for column, rank in ((2, "7"), (3, "1")):
        shown = [row[column] for row in tables(TEXT, "s of a step")]
        pairs, forward, backward, weights, waiting, update = shown
        assert parts[rank][:6] == [forward, backward, weights, pairs, waiting, update]
