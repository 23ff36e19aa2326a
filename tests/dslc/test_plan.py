"""`dslc plan`: tables, JSON, another cluster, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dslc.specs import shipped
from tests.support.command import Run
from tests.support.golden import Golden

V3, TINY = shipped()["deepseek_v3"], shipped()["deepseek_v3_tiny"]
PARALLEL = "parallel={cluster: cpu_2x2, pipeline: 2, expert: 2, batch: 8, sequence_length: 64}"


@pytest.mark.slow
def test_the_whole_text(dslc: Run, golden: Golden) -> None:
    # A path of the same length everywhere: columns are as wide as what they hold.
    Path("tiny.yaml").write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
    outcome = dslc("plan", "tiny.yaml", "--set", PARALLEL, "--why")
    assert (outcome.status, outcome.err) == (0, "")
    golden("cli/plan_tiny.txt", outcome.out)


@pytest.mark.slow
def test_json_is_what_a_build_holds(dslc: Run) -> None:
    printed = dslc("plan", TINY, "--set", PARALLEL, "--format", "json").out
    dslc("build", TINY, "--set", PARALLEL, "-o", "tiny")
    assert Path("tiny/plan.json").read_text(encoding="utf-8") == printed
    plan = json.loads(printed)
    assert plan["fits"] and [rank["pipeline_rank"] for rank in plan["ranks"]] == [0, 1]
    stages = [stage["layers"] for stage in plan["stages"]]
    assert stages == [[0, 1, 2], []]
    manifest = json.loads(Path("tiny/manifest.json").read_text(encoding="utf-8"))
    assert "cpu_2x2.yaml" in [one["name"] for one in manifest["inputs"]]
    assert "plan.json" in manifest["outputs"]


@pytest.mark.slow
def test_a_build_without_the_section_has_no_plan(dslc: Run) -> None:
    dslc("build", TINY, "-o", "tiny")
    assert (
        "plan.json"
        not in json.loads(Path("tiny/manifest.json").read_text(encoding="utf-8"))["outputs"]
    )
    outcome = dslc("plan", TINY)
    assert outcome.status == 1 and "E532" in outcome.err


@pytest.mark.slow
def test_another_cluster_may_be_too_small_or_impossible(dslc: Run) -> None:
    impossible = dslc("plan", V3, "--cluster", "h100_8")
    assert impossible.status == 1 and "E530" in impossible.err
    assert dslc("check", V3, "--set", "parallel.cluster=h100_8").status == 1
    small = dslc("plan", V3, "--cluster", "h100_8", "--set", "parallel.pipeline=8",
                 "--set", "parallel.expert=1", "--set", "parallel.batch=16")  # fmt: skip
    assert small.status == 1 and "E531" in small.err and "peak GB" in small.out
    told = json.loads(
        dslc("plan", V3, "--cluster", "h100_8", "--set", "parallel.pipeline=8",
             "--set", "parallel.expert=1", "--set", "parallel.batch=16", "--format", "json").out
    )  # fmt: skip
    assert [d["code"] for d in told["diagnostics"]] == ["E531"]


@pytest.mark.slow
def test_a_build_that_does_not_fit_is_built_and_says_so(dslc: Run) -> None:
    sets = ["--set", "parallel.batch=16", "--set", "parallel.pipeline=8"]
    outcome = dslc("build", V3, "--set", "parallel.cluster=h100_8", "--set", "parallel.expert=1",
                   *sets, "-o", "v3")  # fmt: skip
    assert outcome.status == 0 and "does not fit h100_8" in outcome.out
