"""Schedules: valid, as short as published, and in the order of torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as of_torch

from compiler.plan.check import blocked, problems
from compiler.plan.schedule import (
    SCHEDULES,
    Chunk,
    Entry,
    Receive,
    Schedule,
    Send,
    schedule,
    schedule_from_json,
    word,
)
from compiler.plan.simulate import ChunkCosts, simulate
from compiler.plan.transfers import most_held, with_transfers
from tests.support.golden import Golden
from tests.support.schedules import open_receives, under_way

COSTS = [ChunkCosts(), ChunkCosts(1, 1, 0.5), ChunkCosts(2, 3, 1), ChunkCosts(1.13, 1.99, 0.48)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_four_ranks_and_eight_micro_batches(name: str, golden: Golden) -> None:
    golden(f"schedules/{name}.txt", str(schedule(name, 4, 8)))


@pytest.mark.slow
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 30))
def test_every_schedule_can_be_run(name: str, pipeline: int, batches: int) -> None:
    try:
        made = schedule(name, pipeline, batches)
    except ValueError:
        assert name.startswith("dualpipe")
        return
    assert problems(with_transfers(made)) == []


def bubbles(made: Schedule, costs: ChunkCosts) -> list[float]:
    line = simulate(made, costs)
    return [line.bubble(rank) for rank in range(len(made.rows))]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("pipeline", "batches"), [(2, 4), (4, 8), (8, 20), (16, 64)])
def test_bubbles_are_those_of_the_report(pipeline: int, batches: int, costs: ChunkCosts) -> None:
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


@pytest.mark.parametrize("costs", [*COSTS, ChunkCosts(pair=2.5)])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@pytest.mark.parametrize("half", [1, 2, 4, 8])
def test_bubble_of_dualpipe(name: str, half: int, costs: ChunkCosts) -> None:
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
    order = schedule("1f1b", pipeline, batches)
    for rank in range(pipeline):
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
        assert [str(chunk) for (chunk,) in order.steps(rank)] == theirs._stage.order


@pytest.mark.parametrize(("pipeline", "batches"), [(2, 4), (4, 8), (4, 11)])
def test_dualpipe_v_is_the_order_of_torch(pipeline: int, batches: int) -> None:
    theirs: Any = object.__new__(of_torch.ScheduleDualPipeV)
    theirs.pp_group_size, theirs._num_stages = pipeline, 2 * pipeline
    theirs._n_microbatches, theirs.n_local_stages = batches, 2
    made = schedule("dualpipe_v", pipeline, batches)
    for rank in range(pipeline):
        order = theirs._calculate_single_rank_operations(rank)
        compute = [a for a in order if a is not None and a.computation_type.value != "REDUCE_GRAD"]
        expected = [[str(s) for s in a.sub_actions or (a,)] for a in compute]
        assert [[str(chunk) for chunk in step] for step in made.steps(rank)] == expected


# ---- transfers ---------------------------------------------------------------------------------


def test_sends_and_receives_stand_in_the_rows_in_ascending_numbers() -> None:
    made = with_transfers(schedule("1f1b", 2, 2))
    assert [one.key for one in made.messages] == [
        ("F", 1, 0), ("F", 1, 1), ("B", 0, 0), ("B", 0, 1),
    ]  # fmt: skip
    first, second = (" ".join(map(word, row)).replace("receive", "recv") for row in made.rows)
    assert first == "0F0 send 0 0F1 send 1 recv 2 0B0 recv 3 0B1"
    assert second == "recv 0 1F0 recv 1 1B0 send 2 1F1 1B1 send 3"


def sizes(name: str, pipelines: Iterable[int]) -> Iterator[Schedule]:
    for p in pipelines:
        for batches in (p, 2 * p, 2 * p + 1, 2 * p + 2, 3 * p, 4 * p, 60, 120):
            with suppress(ValueError):  # dualpipe wants even numbers, and enough of them
                yield schedule(name, p, batches)


def check_blocking(name: str, pipelines: Iterable[int]) -> int:
    """How many schedules run with every send and receive blocking, with collectives in chunks."""
    found = list(sizes(name, pipelines))
    for one in found:
        made = with_transfers(one)
        assert problems(made) == []
        assert blocked(made, members=2) == []
        assert max(open_receives(made, rank) for rank in range(len(made.rows))) <= 4
    return len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_waits_for_ever(name: str) -> None:
    assert check_blocking(name, (2, 3, 4)) >= 7


@pytest.mark.slow
def test_no_rank_waits_for_ever_at_any_size() -> None:
    """All four schedules, pipelines of 2 to 16 ranks, up to 120 micro-batches."""
    assert sum(check_blocking(name, range(2, 17)) for name in SCHEDULES) == 393


def around_chunks(made: Schedule) -> Schedule:
    """Receives right before the chunk that reads them, sends right behind: as it is easily done."""
    numbers = {one.key: number for number, one in enumerate(made.messages)}
    rows = []
    for rank in range(len(made.rows)):
        row: list[Entry] = []
        for step in made.steps(rank):
            arriving = [numbers[c.reads] for c in step if c.reads in numbers]
            row += [Receive(n) for n in arriving if made.messages[n].receiver == rank]
            row.append(step)
            row += [Send(numbers[m.key]) for c in step if (m := made.message(c))]
        rows.append(tuple(row))
    return replace(made, rows=tuple(rows))


def channels_out_of_order(made: Schedule) -> tuple[int, int]:
    """Pairs (sender, receiver) of which both ends go through other messages, and all of them."""
    ends: dict[type, dict[tuple[int, int], list[int]]] = {Send: {}, Receive: {}}
    for row in made.rows:
        for entry in row:
            if not isinstance(entry, tuple):
                message = made.messages[entry.number]
                pair = message.sender, message.receiver
                ends[type(entry)].setdefault(pair, []).append(entry.number)
    pairs = ends[Send].keys() | ends[Receive].keys()
    return sum(ends[Send][pair] != ends[Receive][pair] for pair in pairs), len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), [("1f1b", 0), ("dualpipe", 12), ("dualpipe_v", 14)])
def test_one_channel_for_each_pair_of_ranks_is_enough(name: str, wrong: int) -> None:
    """NCCL has no tags: both ends of a pair must go through its messages in one order."""
    made = with_transfers(schedule(name, 16, 120))
    assert channels_out_of_order(made) == (0, 30)
    easy = around_chunks(made)
    assert channels_out_of_order(easy) == (wrong, 30)
    assert any("not in ascending numbers" in problem for problem in problems(easy))
    assert blocked(easy)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_written_and_read_back(name: str) -> None:
    for made in (schedule(name, 4, 8), with_transfers(schedule(name, 4, 8))):
        assert schedule_from_json(made.to_json()) == made


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": 1}', "no JSON"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        schedule_from_json(text)


def test_an_entry_of_a_schedule_that_is_none_is_refused() -> None:
    text = schedule("1f1b", 1, 1).to_json().replace("0F0", "0G0")
    with pytest.raises(ValueError, match="'0G0' is no entry of a schedule"):
        schedule_from_json(text)


# ---- what is noticed ---------------------------------------------------------------------------


def broken(name: str) -> Schedule:
    made = with_transfers(schedule("1f1b", 2, 3))
    first, second = map(list, made.rows)
    match name:
        case "lost":
            del first[-1]
        case "twice":
            first.append(first[-1])
        case "elsewhere":
            second.append((Chunk("F", 0, 0),))
        case "wait":
            a, b = (first.index((Chunk(kind, 0, 0),)) for kind in "FB")
            first[a], first[b] = first[b], first[a]
        case "order":
            a, b = second.index(Receive(0)), second.index(Receive(1))
            second[a], second[b] = second[b], second[a]
        case "late":
            second.insert(3, second.pop(second.index(Receive(0))))
        case "not sent":
            first.remove(Send(0))
        case "foreign":
            first.insert(0, Receive(0))
        case "without":
            return schedule("1f1b", 2, 3)
    return replace(made, rows=(tuple(first), tuple(second)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lost", "0I2 is done 0 times"),
        ("twice", "0I2 is done 2 times"),
        ("elsewhere", "0F0 is on rank 1, which does not hold the stage"),
        ("wait", "ranks wait for one another: rank 0 at 0B0, rank 1 at 1F0"),
        ("order", "rank 1: receive 0 after 1, not in ascending numbers"),
        ("late", "rank 1 computes 1F0 before it receives what that reads"),
        ("not sent", "rank 0 does not send message 0"),
        ("foreign", "rank 0: receive 0, which it does not have or need"),
        ("without", "rank 0 does not send message None"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_noticed(name: str, words: str) -> None:
    assert words in problems(broken(name))


def test_a_send_that_no_rank_is_ready_for_blocks() -> None:
    made = with_transfers(schedule("dualpipe", 2, 4))
    row = list(made.rows[0])
    at = next(i for i, e in enumerate(row) if isinstance(e, Send))
    late = next(i for i in range(at + 1, len(row)) if not isinstance(row[i], tuple))
    assert row[late] != row[at]
    row[at], row[late] = row[late], row[at]
    assert blocked(replace(made, rows=(tuple(row), made.rows[1])))


@pytest.mark.parametrize(("pipeline", "batches"), [(3, 12), (4, 6), (4, 9)])
def test_dualpipe_wants_even_numbers_and_enough_micro_batches(pipeline: int, batches: int) -> None:
    with pytest.raises(ValueError, match="dualpipe needs an even number of ranks"):
        schedule("dualpipe", pipeline, batches)


def test_what_gradients_of_weights_read_is_held_from_i_to_w() -> None:
    """Rank 0 has four micro-batches in flight, then three and one that waits; the last rank one in
    flight and three that wait, and by the end four that wait."""
    order = schedule("zero_bubble", 4, 8)
    for operands, first, last in ((0, 400, 100), (90, 400, 370), (300, 600, 1200)):
        each = dict.fromkeys(range(4), operands)
        most = [most_held(order, r, dict.fromkeys(range(4), 100), 0, each) for r in (0, 3)]
        assert most == [first, last]
