"""Batches that grow in training: which counts of micro-batches have a schedule, and which one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from compiler.pipeline import compile
from compiler.plan.check import blocked, problems
from compiler.plan.greedy import greedy, schedule_of
from compiler.plan.make import make_plan, planner_of, step_counts
from compiler.plan.ramp import MOST, BatchSizes, micro_batches, rounds, uneven
from compiler.plan.schedule import SCHEDULES, schedule
from compiler.plan.search import neighbours
from compiler.plan.simulate import ChunkCosts, simulate
from compiler.plan.transfers import with_transfers
from dsl.diagnostic import DiagnosticError, render
from dsl.load import Description, load
from dsl.schema import Schedule
from dslc.specs import shipped
from runtime.config import Config
from runtime.train.pipeline import rounds as rounds_of_runtime
from tests.support.golden import Golden
from tests.support.schedules import under_way


def v3(batch: str) -> Description:
    return load(shipped()["deepseek_v3"], sets=[f"train.batch={batch}"])


def ramp(text: str) -> Schedule:
    batch = v3(text).spec.train.batch
    assert batch is not None
    return batch


@pytest.mark.slow
def test_the_shipped_v3_starts_under_its_own_layout() -> None:
    """With 24 micro-batches, for which DualPipe over 16 ranks has no order of its own."""
    description = load(shipped()["deepseek_v3"])
    plan = make_plan(description, compile(description))
    assert plan is not None
    counts = step_counts(description, plan.layout)
    assert counts == tuple(range(24, 121, 8))
    for count in (counts[0], counts[-1]):
        order = with_transfers(schedule_of("dualpipe", 16, count))
        assert problems(order) == [] and order.batches == count


@pytest.mark.parametrize(
    ("train", "counts"),
    [([], (4,)), (["train.micro_batch=2"], (2,)), (["train.batch=8", "train.micro_batch=4"], (1,))],
)
def test_a_batch_that_does_not_grow_has_one_count(train: list[str], counts: tuple[int]) -> None:
    """By the micro-batches of training, whatever size the plan has."""
    layout = "parallel={cluster: cpu_2x2, pipeline: 2, batch: 8, sequence_length: 16}"
    description = load(shipped()["deepseek_v3_tiny"], sets=[layout, *train])
    plan = make_plan(description, compile(description))
    assert plan is not None and step_counts(description, plan.layout) == counts


def test_stairs_reach_both_ends_and_are_bounded() -> None:
    sizes = BatchSizes(data=2, micro_batch=1, directions=2)
    assert micro_batches(ramp("[{until: 1M, start: 4, value: 16}, {value: 16}]"), sizes) == (
        2, 4, 6, 8,
    )  # fmt: skip
    assert micro_batches(ramp("[{until: 1M, start: 16, value: 4}, {value: 8}]"), sizes) == (
        2, 4, 6, 8,
    )  # fmt: skip
    assert micro_batches(ramp("[{until: 1M, value: 4}, {value: 16}]"), sizes) == (2, 8)
    long = micro_batches(ramp("[{until: 1M, start: 4, value: 4000}, {value: 4000}]"), sizes)
    assert len(long) <= MOST and (long[0], long[-1]) == (2, 2000)
    steps = {b - a for a, b in pairwise(long[:-1])}
    assert len(steps) == 1 and all(count % 2 == 0 for count in long)


def test_many_micro_batches_are_executed_in_rounds() -> None:
    """By the rule of the runtime, of even lengths that both directions share."""
    for count, ways, most in (
        (120, 2, 256),
        (15360, 2, 256),
        (15838, 2, 256),
        (7, 1, 2),
        (9, 1, 9),
    ):
        found = rounds(count, ways, most)
        config = Config({"stages": [()] * ways, "longest_schedule": most})
        assert rounds_of_runtime(count, config) == found
        assert sum(found) == count and max(found) <= most
        assert max(found) - min(found) <= ways and not any(size % ways for size in found)
        assert len(found) == math.ceil(count / most)


def test_every_end_of_a_phase_has_to_divide() -> None:
    sizes = BatchSizes(data=2, micro_batch=3, directions=2)
    assert uneven(ramp("[{until: 1M, start: 12, value: 24}, {value: 36}]"), sizes) == []
    assert uneven(ramp("[{until: 1M, start: 6, value: 24}, {value: 30}]"), sizes) == [6, 30]
    assert uneven(ramp("[{until: 1M, start: 0, value: 24}, {value: 24}]"), sizes) == [0]


@pytest.mark.slow
def test_layouts_that_are_proposed_can_be_trained() -> None:
    """V3's batch begins at 3,072 sequences, of which 2,048 data ranks cannot all have as many."""
    layout = "cluster: h800_2048, sequence_length: 4096, pipeline: 1, expert: 64, batch: 4096"
    sets = [f"parallel={{{layout}, schedule: dualpipe}}"]
    description = load(shipped()["deepseek_v3"], sets=sets)
    compiled = compile(description)
    parallel, batch = description.spec.parallel, description.spec.train.batch
    assert parallel is not None and batch is not None
    near = neighbours(planner_of(description, compiled), parallel)
    cut = [one for one in near if one.pipeline * one.expert > 1]
    assert cut and not any(uneven(batch, BatchSizes.of(one, 2048 // one.pipeline)) for one in cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "batch"),
    [
        ("ramp_too_small", "[{until: 469B, start: 100, value: 15360}, {value: 15360}]"),
        ("ramp_uneven", "[{until: 469B, start: 3000, value: 15300}, {value: 15360}]"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(case: str, batch: str, golden: Golden) -> None:
    description = v3(batch)
    with pytest.raises(DiagnosticError) as raised:
        make_plan(description, compile(description))
    golden(f"plan/E534_{case}.txt", render(raised.value.diagnostics))


@pytest.mark.parametrize("name", SCHEDULES)
def test_greedy_schedules_can_be_run_and_keep_no_more(name: str) -> None:
    """Also where all sends and receives wait, with collectives in the chunks."""
    for pipeline in (2, 4, 6) if name == "dualpipe" else (2, 3, 5):
        full = schedule(name, pipeline, 4 * pipeline)
        most = [under_way(full, rank) for rank in range(pipeline)]
        for batches in range(2, 2 * pipeline + 1, 2):
            order = with_transfers(greedy(name, pipeline, batches))
            assert problems(order) == []
            assert not blocked(order, members=2)
            kept = [under_way(order, rank) for rank in range(pipeline)]
            assert all(a <= b for a, b in zip(kept, most, strict=True)), (pipeline, batches)


def test_a_greedy_schedule_has_the_bubble_of_1f1b() -> None:
    """Its length is the least that 1F1B's rule allows: (p - 1) more forward and backward chunks."""
    for pipeline, batches in ((2, 4), (4, 4), (4, 9)):
        ours = simulate(greedy("1f1b", pipeline, batches), ChunkCosts()).end
        assert ours == simulate(schedule("1f1b", pipeline, batches), ChunkCosts()).end
    # From both ends at once ranks are busier than with half the ranks idle at first.
    both = simulate(greedy("dualpipe", 8, 8), ChunkCosts()).end
    assert both < simulate(greedy("1f1b", 8, 8), ChunkCosts()).end


def test_micro_batches_that_cannot_be_dealt_to_both_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="2 directions"):
        greedy("dualpipe", 4, 3)
