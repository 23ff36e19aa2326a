"""Where the pipeline is cut: stages of nearly equal work, by dynamic programming over units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.analysis.modules import Modules
from compiler.analysis.work import total
from compiler.graph.core import Program
from compiler.parallel.layout import Stage, Unit


@dataclass(frozen=True)
class Flops:
    """Of matrix products and the core of attention; `fp8` of them are in FP8."""

    total: int = 0
    fp8: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.total + other.total, self.fp8 + other.fp8)

    def times(self, count: int) -> Flops:
        return Flops(count * self.total, count * self.fp8)


def unit_flops(
    program: Program, units: Sequence[Unit], sizes: Mapping[str, int]
) -> dict[range, Flops]:
    """One forward pass through each kind of unit; equal layers once."""
    modules = Modules(program)
    main = program.main
    found: dict[range, Flops] = {}
    for unit in units:
        if unit.ops not in found:
            module = modules.root([main.ops[i] for i in unit.ops], sizes)
            count = 1 if unit.layer is None else main.ops[unit.ops[0]].number("count")
            found[unit.ops] = Flops(total(module.flops) // count, module.fp8_flops // count)
    return found


def cut(units: Sequence[Unit], costs: Sequence[int], stages: int) -> tuple[Stage, ...]:
    """`units` cut into as many `stages`, each of at least one unit.

    The costliest stage is as cheap as can be: it sets the pace of all. Among such cuts the one of
    the smallest sum of squares is taken, and then the one that has its work late, because later
    stages keep activations for fewer micro-batches.
    """
    ends = _ends(costs, stages, _bottleneck(costs, stages))
    starts = (0, *ends[:-1])
    return tuple(
        Stage(i, tuple(units[start:end]))
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def _bottleneck(costs: Sequence[int], stages: int) -> int:
    """The least cost that no stage of the best cut exceeds."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _fits(costs, stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(costs: Sequence[int], stages: int, limit: int) -> bool:
    """Whether stages of at most `limit` suffice: each takes as many units as it can."""
    used, room = 1, limit
    for cost in costs:
        if cost > room:
            used, room = used + 1, limit
        room -= cost
    return used <= stages


_Score = tuple[int, int]  # sum of squares, and work weighted by the stages that follow


def _ends(costs: Sequence[int], stages: int, limit: int) -> tuple[int, ...]:
    """Where each stage ends in the best cut of stages of at most `limit`."""
    count = len(costs)
    best: dict[int, tuple[_Score, tuple[int, ...]]] = {0: ((0, 0), ())}
    for stage in range(stages):
        after = stages - stage - 1
        found: dict[int, tuple[_Score, tuple[int, ...]]] = {}
        for start, ((squares, early), ends) in best.items():
            cost = 0
            # Enough units must be left for the stages that follow, one each.
            for end in range(start + 1, count - after + 1):
                cost += costs[end - 1]
                if cost > limit:
                    break
                score = (squares + cost * cost, early + cost * after)
                if end not in found or score < found[end][0]:
                    found[end] = (score, (*ends, end))
        best = found
    return best[count][1]
