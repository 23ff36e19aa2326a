"""Schedules: valid, as short as published, and in the order of torch's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as of_torch

from compiler.plan.schedule import SCHEDULES, Action, Schedule, schedule, with_transfers
from compiler.plan.simulate import Costs, problems, simulate, under_way
from tests.support.golden import Golden

COSTS = [Costs(), Costs(1, 1, 0.5), Costs(2, 3, 1), Costs(1.13, 1.99, 0.48)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_four_ranks_and_eight_micro_batches(name: str, golden: Golden) -> None:
    golden(f"schedules/{name}.txt", str(schedule(name, 4, 8)))


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 30))
def test_every_schedule_can_be_run(name: str, pipeline: int, batches: int) -> None:
    try:
        made = schedule(name, pipeline, batches)
    except ValueError:
        assert name.startswith("dualpipe")
        return
    assert problems(made) == []


def bubbles(made: Schedule, costs: Costs) -> list[float]:
    line = simulate(made, costs)
    return [line.bubble(rank) for rank in range(len(made.ranks))]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("pipeline", "batches"), [(2, 4), (4, 8), (8, 20), (16, 64)])
def test_bubbles_are_those_of_the_report(pipeline: int, batches: int, costs: Costs) -> None:
    """Table 2: 1F1B (PP-1)(F+B), ZB1P (PP-1)(F+B-2W), DualPipe (PP/2-1)(F&B+B-3W)."""
    f, b, w = costs.forward, costs.input + costs.weight, costs.weight
    expected = {
        "1f1b": (pipeline - 1) * (f + b),
        "zero_bubble": (pipeline - 1) * (f + b - 2 * w),
    }
    for name, bubble in expected.items():
        assert bubbles(schedule(name, pipeline, batches), costs) == pytest.approx(
            [bubble] * pipeline
        )


@pytest.mark.parametrize("costs", [*COSTS, Costs(pair=2.5)])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@pytest.mark.parametrize("half", [1, 2, 4, 8])
def test_bubble_of_dualpipe(name: str, half: int, costs: Costs) -> None:
    """(PP/2-1)(F&B+B-3W), if a forward chunk takes as long as gradients of inputs; else it is less.

    DualPipeV has half as many ranks.
    """
    made = schedule(name, 2 * half if name == "dualpipe" else half, 8 * half)
    b, w = costs.input + costs.weight, costs.weight
    bubble = (half - 1) * ((costs.pair or costs.forward + b) + b - 3 * w)
    longest = max(bubbles(made, costs))
    if costs.forward == costs.input:
        assert longest == pytest.approx(bubble)
    else:
        assert longest <= bubble


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_activations_under_way(pipeline: int) -> None:
    """Table 2: PP for 1F1B and ZB1P, PP + 1 for DualPipe."""
    batches = 4 * pipeline
    most = {
        name: max(under_way(schedule(name, pipeline, batches), r) for r in range(pipeline))
        for name in ("1f1b", "zero_bubble", "dualpipe")
    }
    assert most == {"1f1b": pipeline, "zero_bubble": pipeline, "dualpipe": pipeline + 1}
    v = schedule("dualpipe_v", pipeline // 2, batches)
    assert max(under_way(v, r) for r in range(pipeline // 2)) == pipeline + 1


class Recorder:
    """Stands for torch's pipeline stage, and writes down which chunks it is asked to compute."""

    def __init__(self, stage: int) -> None:
        self.stage_index = stage
        self.order: list[str] = []

    def forward_one_chunk(self, batch: int, *_: object, **__: object) -> None:
        self.order.append(f"{self.stage_index}F{batch}")

    def backward_one_chunk(self, batch: int, **_: object) -> None:
        self.order.append(f"{self.stage_index}B{batch}")

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: []  # transfers


@pytest.mark.parametrize(("pipeline", "batches"), [(1, 3), (2, 2), (4, 8), (5, 11)])
def test_1f1b_is_the_order_of_torch(pipeline: int, batches: int) -> None:
    """What it runs; its own list of it (`_get_pipeline_order`, 2.13) miscounts the last rank."""
    for rank, steps in enumerate(schedule("1f1b", pipeline, batches).ranks):
        theirs: Any = object.__new__(of_torch.Schedule1F1B)
        theirs._num_stages, theirs._n_microbatches = pipeline, batches
        theirs._stage, theirs.scale_grads = Recorder(rank), False
        theirs._check_inputs = lambda *_: ([()] * batches, [{}] * batches)
        for name in (
            "_initialize_stage",
            "_maybe_compute_loss",
            "_maybe_get_loss",
            "_update_losses",
        ):
            setattr(theirs, name, lambda *_: None)
        theirs._step_microbatches()
        assert [str(action) for (action,) in steps] == theirs._stage.order


@pytest.mark.parametrize(("pipeline", "batches"), [(2, 4), (4, 8), (4, 11)])
def test_dualpipe_v_is_the_order_of_torch(pipeline: int, batches: int) -> None:
    theirs: Any = object.__new__(of_torch.ScheduleDualPipeV)
    theirs.pp_group_size, theirs._num_stages = pipeline, 2 * pipeline
    theirs._n_microbatches, theirs.n_local_stages = batches, 2
    made = schedule("dualpipe_v", pipeline, batches)
    for rank, steps in enumerate(made.ranks):
        order = theirs._calculate_single_rank_operations(rank)
        compute = [a for a in order if a is not None and a.computation_type.value != "REDUCE_GRAD"]
        expected = [[str(s) for s in a.sub_actions or (a,)] for a in compute]
        assert [[str(action) for action in step] for step in steps] == expected


def test_transfers_stand_around_what_needs_them() -> None:
    first, second = with_transfers(schedule("1f1b", 2, 2))
    assert " ".join(map(str, first)) == ("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1")
    assert " ".join(map(str, second)) == ("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1")


def broken(name: str) -> Schedule:
    made = schedule("1f1b", 2, 3)
    first, second = (list(steps) for steps in made.ranks)
    match name:
        case "lost":
            del first[-1]
        case "twice":
            first.append(first[-1])
        case "elsewhere":
            second.append((Action("F", 0, 0),))
        case "wait":
            first[:2] = [(Action("B", 0, 0),), (Action("F", 0, 0),)]
        case "order":
            second[0], second[1], second[2], second[3] = second[2], second[3], second[0], second[1]
    return replace(made, ranks=(tuple(first), tuple(second)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lost", "0I2 is done 0 times"),
        ("twice", "0I2 is done 2 times"),
        ("elsewhere", "0F0 is on rank 1, which does not hold the stage"),
        ("wait", "ranks wait for one another: rank 0 at 0B0, rank 1 at 1F0"),
        ("order", "rank 1 receives F from rank 0 in another order than they are sent"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_noticed(name: str, words: str) -> None:
    assert words in problems(broken(name))


@pytest.mark.parametrize(("pipeline", "batches"), [(3, 12), (4, 6), (4, 9)])
def test_dualpipe_wants_even_numbers_and_enough_micro_batches(pipeline: int, batches: int) -> None:
    with pytest.raises(ValueError, match="dualpipe needs an even number of ranks"):
        schedule("dualpipe", pipeline, batches)
