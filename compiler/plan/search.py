"""Layouts near one that cannot be or does not fit. Small on purpose: it proposes, people choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import get_args

from compiler.parallel.layout import placement
from compiler.plan.plan import Plan, Planner
from compiler.plan.possible import LayoutProblem, problems
from compiler.plan.ramp import BatchSizes, uneven
from dsl.schema import Parallel
from dsl.schema.sections import ScheduleName

# Plans are made for so many candidates at most before a search gives up.
MAX_TRIED = 60


def why_not(planner: Planner, parallel: Parallel) -> list[LayoutProblem]:
    """Why a layout cannot be; nothing where it can."""
    return list(
        problems(parallel, planner.cluster, len(planner.units), planner.experts, planner.longest)
    )


def neighbours(planner: Planner, parallel: Parallel) -> list[Parallel]:
    """Layouts that can be, the nearest first. Each factor of two of a size counts as one step."""
    ranks = planner.cluster.ranks
    length = min(parallel.sequence_length, planner.longest)
    near = parallel.model_copy(update={"sequence_length": length})
    found: dict[Parallel, float] = {}
    for pipeline, schedule in product(_divisors(ranks), get_args(ScheduleName)):
        if pipeline > len(planner.units):
            break
        for expert in _divisors(ranks // pipeline):
            for changed in _with_batch(near, ranks // pipeline, pipeline, expert, schedule):
                if changed == parallel or why_not(planner, changed):
                    continue
                if _deals(planner, changed):
                    found.setdefault(changed, _distance(parallel, changed))
    return sorted(found, key=lambda one: (found[one], one.pipeline, one.expert, one.micro_batch))


def _deals(planner: Planner, parallel: Parallel) -> bool:
    """Whether the batches that training has on the way can be dealt, too."""
    if planner.batch is None or parallel.pipeline * parallel.expert == 1:
        return True
    sizes = BatchSizes.of(parallel, planner.cluster.ranks // parallel.pipeline)
    return not uneven(planner.batch, sizes)


def that_fit(planner: Planner, parallel: Parallel, count: int = 3) -> list[Plan]:
    """The nearest `count` plans that fit."""
    found: list[Plan] = []
    for candidate in neighbours(planner, parallel)[:MAX_TRIED]:
        plan = planner.plan(candidate)
        if plan.fits:
            found.append(plan)
        if len(found) == count:
            break
    return found


def changes(parallel: Parallel, other: Parallel) -> str:
    """What to write instead: `pipeline: 8, expert: 32`."""
    before, after = parallel.model_dump(), other.model_dump()
    return ", ".join(f"{key}: {after[key]}" for key in after if after[key] != before[key])


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _with_batch(
    parallel: Parallel, data: int, pipeline: int, expert: int, schedule: str
) -> Iterator[Parallel]:
    """The layout with micro-batches of the same size or smaller, and a batch that can be dealt."""
    base = {"pipeline": pipeline, "expert": expert, "schedule": schedule}
    for size in _divisors(parallel.micro_batch):
        share = data * size * len(placement(schedule, pipeline))
        least = {"dualpipe": pipeline, "dualpipe_v": 2 * pipeline}.get(schedule, 1)
        for batch in (parallel.batch, share * max(least, round(parallel.batch / share))):
            yield parallel.model_copy(update={**base, "micro_batch": size, "batch": batch})


def _distance(parallel: Parallel, other: Parallel) -> float:
    steps = sum(
        abs(math.log2(getattr(parallel, key) / getattr(other, key)))
        for key in ("pipeline", "expert", "micro_batch", "batch")
    )
    # Another batch is another training run, another schedule another program.
    return steps + 2 * (parallel.batch != other.batch) + (parallel.schedule != other.schedule)
