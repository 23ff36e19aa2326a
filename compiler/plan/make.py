"""The front door: a description and its compiled programs to a plan, or to diagnostics."""

from __future__ import annotations

from compiler.graph.core import Program
from compiler.pipeline import Compiled
from compiler.plan.plan import Plan, Planner
from compiler.plan.search import changes, neighbours, why_not
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description


def make_plan(description: Description, compiled: Compiled) -> Plan | None:
    """The plan that `parallel` of a spec asks for; None where a spec has no such section.

    Raises `DiagnosticError` (E530) where the layout cannot be; whether it fits is `Plan.fits`.
    """
    parallel = description.spec.parallel
    if parallel is None:
        return None
    planner = planner_of(description, compiled)
    wrong = why_not(planner, parallel)
    if wrong:
        near = [changes(parallel, one) for one in neighbours(planner, parallel)[:3]]
        help = f"the nearest that can be: {'; '.join(near)}" if near else ""
        spans = [description.span("parallel", problem.key) for problem in wrong]
        raise DiagnosticError(
            Diagnostic("E530", one.message, span, "this cannot be", help="" if i else help)
            for i, (one, span) in enumerate(zip(wrong, spans, strict=True))
        )
    return planner.plan(parallel)


def planner_of(description: Description, compiled: Compiled) -> Planner:
    """The planner of a model whose spec has a section `parallel`."""
    assert description.cluster is not None
    longest = description.spec.sequence.max_position_embeddings
    train = compiled.programs["train"]
    return Planner(planned(compiled), train, description.cluster, longest)


def planned(compiled: Compiled) -> Program:
    """What training computes, as the equations say it: before operators are fused."""
    program = compiled.lowered
    for step in compiled.steps_of("train"):
        if step.name not in ("lower", "select_outputs", "drop_cache", "simplify"):
            break
        program = step.program
    return program
