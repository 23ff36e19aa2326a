"""Layouts that cannot be or do not fit: the message, and that what it proposes is right."""

from __future__ import annotations

import pytest

from compiler.pipeline import compile
from compiler.plan.explain import misfit
from compiler.plan.make import make_plan, planner_of
from compiler.plan.search import changes, neighbours, that_fit, why_not
from dsl.diagnostic import DiagnosticError, render
from dsl.load import Description, load
from dslc.specs import shipped
from tests.support.golden import Golden
from tests.support.planners import planner

V3_WITH = "cluster: h800_2048, sequence_length: 4096"
CANNOT = {
    "stages": "pipeline: 12, expert: 64, batch: 15360",
    "nodes": "pipeline: 16, expert: 12, batch: 15360",
    "experts": "pipeline: 16, expert: 48, batch: 15360",
    "batch": "pipeline: 16, expert: 64, batch: 15000, schedule: dualpipe",
    "too_few_micro_batches": "pipeline: 16, expert: 64, batch: 2048, schedule: dualpipe",
    "units": "pipeline: 64, expert: 32, batch: 2048",
    "dualpipe_v": "pipeline: 16, expert: 64, batch: 2048, schedule: dualpipe_v",
    "folded_at_once": "pipeline: 1, expert: 64, batch: 4096, schedule: dualpipe_v",
    "symmetric": "pipeline: 16, expert: 64, batch: 15360, exchange: symmetric_memory",
    "odd_dualpipe": "pipeline: 1, expert: 64, batch: 4096, schedule: dualpipe",
}


def v3(parallel: str, *more: str) -> Description:
    return load(shipped()["deepseek_v3"], sets=[f"parallel={{{V3_WITH}, {parallel}}}", *more])


@pytest.mark.slow
@pytest.mark.parametrize("case", CANNOT)
def test_a_layout_that_cannot_be(case: str, golden: Golden) -> None:
    description = v3(CANNOT[case])
    compiled = compile(description)
    with pytest.raises(DiagnosticError) as raised:
        make_plan(description, compiled)
    assert {d.code for d in raised.value.diagnostics} == {"E530"}
    golden(f"plan/E530_{case}.txt", render(raised.value.diagnostics))
    made, parallel = planner_of(description, compiled), description.spec.parallel
    assert parallel is not None
    near = neighbours(made, parallel)
    assert near and not any(why_not(made, one) for one in near)


@pytest.mark.slow
def test_a_sequence_longer_than_the_model_takes() -> None:
    description = v3("batch: 2048", "parallel.sequence_length=200000")
    with pytest.raises(DiagnosticError) as raised:
        make_plan(description, compile(description))
    (problem,) = raised.value.diagnostics
    assert "200000" in problem.message and "sequence_length: 163840" in problem.help


@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_what_takes_the_room(golden: Golden) -> None:
    description = v3("pipeline: 8, expert: 64, batch: 15360", "precision.policy=bf16")
    plan = make_plan(description, compile(description))
    assert plan is not None and not plan.fits
    text = render([misfit(plan, planner_of(description, compile(description)), description)])
    name = str(shipped()["deepseek_v3"])
    golden("plan/E531.txt", text.replace(name, "specs/deepseek_v3.yaml"))


@pytest.mark.slow
def test_layouts_that_are_said_to_fit_do() -> None:
    made, parallel = planner("deepseek_v3", f"{{{V3_WITH}, pipeline: 8, expert: 64, batch: 15360}}")
    found = that_fit(made, parallel)
    assert found and all(plan.fits for plan in found)
    assert all(changes(parallel, plan.parallel) for plan in found)


@pytest.mark.slow
def test_without_a_memory_anything_fits() -> None:
    made, parallel = planner(
        "deepseek_v3_tiny", "{cluster: cpu_2x2, batch: 4, sequence_length: 16}"
    )
    assert made.cluster.memory is None and made.plan(parallel).fits
    assert made.plan(parallel).seconds(made.plan(parallel).ranks[0]) == {}
