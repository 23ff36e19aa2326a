"""What a command line names: a program of the model or of a pipeline stage, or a plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from compiler.pipeline import (
    PIPELINES,
    Compiled,
    compile,
    rank_passes,
    run,
    select_passes,
    shared_passes,
)
from compiler.plan.make import make_plan
from compiler.plan.plan import Plan
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description
from dslc.passes import unknown


def compiled_for(
    description: Description,
    program: str,
    stage: int | None,
    skip: Collection[str],
    until: str | None,
) -> tuple[Compiled, str]:
    """All programs of a model, and the name of the wanted one among them.

    With a stage there is one more program: the part of `program` that this stage computes.
    Raises `DiagnosticError`.
    """
    compiled = compile(description, skip=skip, until=until)
    known = compiled.programs if stage is None else PIPELINES  # a server has no stages
    if program not in known:
        raise DiagnosticError([unknown("program", program, known)])
    if stage is None:
        return compiled, program
    plan = make_plan(description, compiled)
    count = len(plan.layout.stages) if plan else 0
    if plan is None or not 0 <= stage < count:
        help = f"its stages are 0 to {count - 1}" if plan else "its spec has no section `parallel`"
        raise DiagnosticError([Diagnostic("E691", f"the model has no stage {stage}", help=help)])
    every = (*shared_passes(program), *rank_passes(program, plan.layout, stage))
    passes = select_passes(every, skip, until)
    name = f"{program}_stage_{stage}"
    steps = list(run(name, compiled.lowered, passes, description))
    programs = {**compiled.programs, name: steps[-1].program}
    return replace(compiled, programs=programs, steps=(*compiled.steps, *steps)), name


def with_plan(description: Description) -> tuple[Compiled, Plan]:
    """All programs of a model, and how they are placed. Raises `DiagnosticError`, E532 without a
    section `parallel`."""
    compiled = compile(description)
    plan = make_plan(description, compiled)
    if plan is None:
        raise DiagnosticError([no_section(description)])
    return compiled, plan


def no_section(description: Description) -> Diagnostic:
    help = "add `parallel: {cluster: h800_2048, pipeline: .., expert: ..}`, or with --set"
    message = f"{description.spec.model} has no parallel layout"
    return Diagnostic("E532", message, description.span(), "there is no `parallel` here", help=help)
