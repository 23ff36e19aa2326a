"""Placement of experts: the published example, and what holds for any load."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.eplb import imbalance, place

# README.md of github.com/deepseek-ai/EPLB: loads of two layers, and the printed placement.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example() -> None:
    """12 experts in 4 groups, 4 copies, 2 nodes of 4 GPUs."""
    for load, expected in zip(LOADS, PLACED, strict=True):
        found = place(load, 4, ranks=8, nodes=2, groups=4)
        assert [expert for rank in found for expert in rank] == expected


@st.composite
def sizes(draw: st.DrawFn) -> tuple[list[int], int, int, int, int]:
    nodes, groups = draw(st.sampled_from([(1, 1), (2, 4), (3, 4), (2, 2)]))
    ranks = nodes * draw(st.integers(1, 4))
    experts = draw(st.integers(1, 2)) * groups * ranks
    counts = st.one_of(st.integers(0, 4), st.integers(0, 1000), st.just(10**6))
    load = draw(st.lists(counts, min_size=experts, max_size=experts))
    return load, draw(st.integers(0, 3 * ranks)), ranks, nodes, groups


@pytest.mark.slow
@given(sizes())
def test_every_expert_has_a_place_and_copies_do_no_harm(
    case: tuple[list[int], int, int, int, int],
) -> None:
    load, redundant, ranks, nodes, groups = case
    found = place(load, redundant, ranks, nodes, groups)
    placed = [expert for rank in found for expert in rank]
    assert {*placed} == {*range(len(load))}
    assert len(found) == ranks and len(placed) == len(load) + redundant
    assert max(map(len, found)) - min(map(len, found)) <= 1
    without = place(load, 0, ranks, nodes, groups)
    assert all(len({*rank}) == len(rank) for rank in without)
    if groups % nodes:
        nodes = 1
    if redundant % nodes == 0:  # else copies are placed globally, unlike experts without them
        size = ranks // nodes
        for node in (slice(i, i + size) for i in range(0, ranks, size)):
            after, before = imbalance(load, found[node]), imbalance(load, without[node])
            assert after <= before
            twice = any(len({*rank}) < len(rank) for rank in found[node])
            avoidable = len(placed) * nodes <= len(load) * ranks
            assert not (twice and avoidable) or after == before
    nodes = case[3]
    assert place(load, redundant, ranks, nodes, groups) == found


@given(st.lists(st.integers(1, 1000), min_size=16, max_size=16), st.integers(1, 16))
def test_copies_of_an_expert_are_on_different_ranks(load: list[int], redundant: int) -> None:
    """Where the busiest expert has more than a rank's share, copies are worth their place."""
    load[5] = 100_000
    found = place(load, redundant, ranks=4)
    assert all(len({*rank}) == len(rank) for rank in found)
    assert sum(5 in rank for rank in found) == min(redundant + 1, 4)


def test_the_groups_of_a_node_stay_together() -> None:
    found = place(LOADS[0], 4, ranks=8, nodes=2, groups=4)
    nodes = [{expert // 3 for rank in found[i : i + 4] for expert in rank} for i in (0, 4)]
    assert nodes[0] | nodes[1] == {0, 1, 2, 3} and not nodes[0] & nodes[1]


def test_imbalance_by_hand() -> None:
    assert imbalance([6, 2, 4], [[0], [1, 2]]) == 1
    assert imbalance([6, 2, 4], [[0, 1], [0, 2]]) == Fraction(7, 6)  # 3 + 2 and 3 + 4
    assert imbalance([0, 0], [[0], [1]]) == 1


@pytest.mark.parametrize("case", [([1], 0, 2), ([], 0, 1), ([1, -1], 0, 1), ([1], -1, 1)])
def test_what_cannot_be_placed(case: tuple[list[int], int, int]) -> None:
    with pytest.raises(ValueError, match="ranks"):
        place(*case)
