"""The cut of the pipeline: against every other cut, on small cases, and of V3 itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from compiler.parallel.layout import Unit
from compiler.plan.stages import cut
from tests.support.planners import planner


def cuts(count: int, stages: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations(range(1, count), stages - 1):
        yield list(pairwise((0, *inner, count)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_cheaper_bottleneck_or_is_more_even(
    costs: list[int], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    units = [Unit(range(i, i + 1), i) for i in range(len(costs))]
    made = cut(units, costs, stages)
    assert [unit for stage in made for unit in stage.units] == units
    assert all(stage.units for stage in made) and len(made) == stages

    def score(sums: list[int]) -> tuple[int, int, int]:
        early = sum(n * (stages - 1 - i) for i, n in enumerate(sums))
        return max(sums), sum(n * n for n in sums), early

    best = min(score([sum(costs[a:b]) for a, b in ends]) for ends in cuts(len(costs), stages))
    assert score([sum(costs[n] for n in stage.layers) for stage in made]) == best


def test_v3_has_four_layers_a_stage_and_one_beside_head_and_mtp() -> None:
    made, parallel = planner("deepseek_v3")
    layers = [len(stage.layers) for stage in made.layout(parallel).stages]
    assert layers == [4] * 15 + [1]


def test_a_thousand_layers_are_cut_at_once() -> None:
    costs = [1 + i * 7919 % 100 for i in range(1000)]
    units = [Unit(range(0, 1), i) for i in range(1000)]
    made = cut(units, costs, 64)
    sums = [sum(costs[n] for n in stage.layers) for stage in made]
    assert max(sums) <= sum(costs) / 64 + 100
