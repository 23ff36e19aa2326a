"""Planners of shipped models, made once."""

from __future__ import annotations

from functools import cache

from compiler.pipeline import compile
from compiler.plan.make import planner_of
from compiler.plan.plan import Planner
from dsl.load import load
from dsl.schema import Parallel
from dslc.specs import shipped


@cache
def planner(spec: str, parallel: str = "", *, fp8: bool = False) -> tuple[Planner, Parallel]:
    """The planner of a shipped spec, with its own `parallel` or another one."""
    description = load(shipped()[spec], sets=[f"parallel={parallel}"] if parallel else ())
    made = planner_of(description, compile(description))
    assert description.spec.parallel is not None
    if fp8:
        made = Planner(made.program, made.cluster, fp8=True, longest=made.longest)
    return made, description.spec.parallel
