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
def planner(spec: str, parallel: str = "", policy: str = "") -> tuple[Planner, Parallel]:
    """The planner of a shipped spec, with its own `parallel` and precision or others."""
    sets = [f"parallel={parallel}"] if parallel else []
    sets += [f"precision.policy={policy}"] if policy else []
    description = load(shipped()[spec], sets=sets)
    assert description.spec.parallel is not None
    return planner_of(description, compile(description)), description.spec.parallel
