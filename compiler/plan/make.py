"""The front door: a description and its compiled programs to a plan, or to diagnostics."""

from __future__ import annotations

from compiler.graph.core import Program
from compiler.parallel.layout import Layout
from compiler.pipeline import Compiled
from compiler.plan.plan import Plan, Planner
from compiler.plan.ramp import BatchSizes, micro_batches, uneven
from compiler.plan.search import changes, neighbours, why_not
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description
from dsl.schema import constant


def make_plan(description: Description, compiled: Compiled) -> Plan | None:
    """The plan that `parallel` of a spec asks for; None where a spec has no such section.

    Raises `DiagnosticError` where the layout cannot be (E530), or where batches of training cannot
    be cut for it (E534); whether it fits is `Plan.fits`.
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
    plan = planner.plan(parallel)
    step_counts(description, plan.layout)
    return plan


def step_counts(description: Description, layout: Layout) -> tuple[int, ...]:
    """The counts of micro-batches that the steps of training have, ascending.

    Raises `DiagnosticError` (E534) where a batch cannot be cut into any.
    """
    train, parallel = description.spec.train, description.spec.parallel
    assert parallel is not None
    if layout.mesh.pipeline * layout.mesh.expert == 1:
        return (layout.micro_batches,)  # data ranks alone take any batch
    batch = train.batch or constant(parallel.batch)
    sizes = BatchSizes.of(parallel, layout.mesh.data, train.micro_batch)
    wrong = uneven(batch, sizes)
    if wrong:
        ways = ", half of them from each end" if sizes.directions > 1 else ""
        shown = " and ".join(f"{value:,.12g}" for value in wrong)
        near = (max(1, round(value / sizes.least)) * sizes.least for value in wrong)
        raise DiagnosticError([
            Diagnostic(
                "E534",
                f"batches of {shown} sequences cannot be dealt evenly to {sizes.data:,} ranks in "
                f"micro-batches of {sizes.micro_batch}{ways}",
                description.span("train", "batch"),
                f"these have to be multiples of {sizes.least:,}",
                help=f"the nearest that can be: {' and '.join(f'{value:,}' for value in near)}",
            )
        ])  # fmt: skip
    return micro_batches(batch, sizes)


def planner_of(description: Description, compiled: Compiled) -> Planner:
    """The planner of a model whose spec has a section `parallel`."""
    assert description.cluster is not None
    longest = description.spec.sequence.max_position_embeddings
    train = compiled.programs["train"]
    batch = description.spec.train.batch
    growing = batch if batch is not None and len(batch.root) > 1 else None
    return Planner(planned(compiled), train, description.cluster, longest, growing)


def planned(compiled: Compiled) -> Program:
    """What training computes, as the equations say it: before operators are fused."""
    program = compiled.lowered
    for step in compiled.steps_of("train"):
        if step.name not in ("lower", "select_outputs", "drop_cache", "simplify"):
            break
        program = step.program
    return program
