"""The order in which each pipeline rank works: forward and backward chunks of micro-batches.

A schedule is data: for each rank a tuple of steps. A chunk is one stage on one micro-batch; its
backward pass is whole (B), or cut into the gradients of inputs (I), for which the stage before
waits, and those of weights (W), which can be done later. `simulate.py` checks and times schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """F, B, I or W of a stage on a micro-batch; or SEND_F, RECV_F, SEND_B, RECV_B of it.

    SEND_F gives the result of a stage to the next one and RECV_F takes what it reads; SEND_B gives
    the gradient of what a stage read to the one before, and RECV_B takes that of its result.
    """

    kind: str
    stage: int
    batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.batch}"


Step = tuple[Action, ...]
"""One action, or a forward and a backward chunk that are computed as one, each hiding the
communication of the other."""


@dataclass(frozen=True)
class Schedule:
    """The steps of each pipeline rank. `holder` tells the rank of a stage for a micro-batch."""

    name: str
    stages: int
    batches: int
    ranks: tuple[tuple[Step, ...], ...]
    holder: Callable[[int, int], int]

    def __str__(self) -> str:
        """A line for each rank, a word for each step."""
        lines = (" ".join("&".join(map(str, step)) for step in steps) for steps in self.ranks)
        return "".join(f"rank {i}: {line}\n" for i, line in enumerate(lines))


def schedule(name: str, pipeline: int, batches: int) -> Schedule:
    """A schedule by name, for `batches` micro-batches in all.

    With `dualpipe` each rank holds two stages, and half of the micro-batches enter at either end;
    with `dualpipe_v` the two stages of a rank are halves of one pipeline, bent back at its end.
    Raises ValueError where the schedule cannot have so many, and KeyError for an unknown name.
    """
    return SCHEDULES[name](pipeline, batches)


def one_forward_one_backward(pipeline: int, batches: int) -> Schedule:
    """1F1B: after as many forward chunks as there are stages to come, one of each in turn.

    arXiv 2104.04473, section 2.2.
    """
    ranks = []
    for rank in range(pipeline):
        warm = min(batches, pipeline - rank)
        steps = [Action("F", rank, i) for i in range(warm)]
        for i in range(batches):
            steps.append(Action("B", rank, i))
            if warm + i < batches:
                steps.append(Action("F", rank, warm + i))
        ranks.append(_one_by_one(steps))
    return Schedule("1f1b", pipeline, batches, tuple(ranks), lambda stage, batch: stage)


def zero_bubble(pipeline: int, batches: int) -> Schedule:
    """ZB1P (ZB-H1): 1F1B in which weight gradients wait until there is nothing else to do.

    Rank r is r weight gradients behind, so that it keeps what `pipeline` micro-batches need, as
    the first rank does with 1F1B. arXiv 2401.10241, section 2.
    """
    ranks = []
    for rank in range(pipeline):
        warm = min(batches, pipeline - rank)
        steps = [Action("F", rank, i) for i in range(warm)]
        for i in range(batches):
            steps.append(Action("I", rank, i))
            if i >= rank:
                steps.append(Action("W", rank, i - rank))
            if warm + i < batches:
                steps.append(Action("F", rank, warm + i))
        steps += [Action("W", rank, i) for i in range(max(0, batches - rank), batches)]
        ranks.append(_one_by_one(steps))
    return Schedule("zero_bubble", pipeline, batches, tuple(ranks), lambda stage, batch: stage)


def dual_pipe(pipeline: int, batches: int) -> Schedule:
    """DualPipe: micro-batches enter at both ends, and chunks that pass each other are overlapped.

    The first half of the micro-batches enters at rank 0, the other one at the last rank. Report,
    section 3.2.1; the order is that of its published code, in eight phases.
    """
    if pipeline % 2 or batches % 2 or batches < 2 * pipeline:
        raise ValueError(
            f"dualpipe needs an even number of ranks and at least twice as many micro-batches, "
            f"even too: not {pipeline} and {batches}"
        )
    half, last = batches // 2, pipeline - 1

    def holder(stage: int, batch: int) -> int:
        return stage if batch < half else last - stage

    ranks = []
    for rank in range(pipeline):
        first = (rank, 0), (last - rank, half)
        # For each rank the near direction is that whose first stages are on its side.
        near, far = first if rank < pipeline // 2 else first[::-1]
        from_end = min(rank, last - rank)
        ranks.append(_eight_phases(from_end, pipeline // 2, half, near, far))
    return Schedule("dualpipe", pipeline, batches, tuple(ranks), holder)


def dual_pipe_v(pipeline: int, batches: int) -> Schedule:
    """DualPipeV: half of DualPipe, in which the pipeline turns back at the last rank.

    Rank r holds the stages r and 2 * pipeline - 1 - r. The order is that of DeepSeek's code.
    """
    if batches < 2 * pipeline:
        raise ValueError(f"dualpipe_v needs at least {2 * pipeline} micro-batches, not {batches}")
    stages = 2 * pipeline

    def holder(stage: int, batch: int) -> int:
        return min(stage, stages - 1 - stage)

    ranks = tuple(
        _eight_phases(rank, pipeline, batches, (rank, 0), (stages - 1 - rank, 0))
        for rank in range(pipeline)
    )
    return Schedule("dualpipe_v", stages, batches, ranks, holder)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_forward_one_backward,
    "zero_bubble": zero_bubble,
    "dualpipe": dual_pipe,
    "dualpipe_v": dual_pipe_v,
}


def _one_by_one(actions: list[Action]) -> tuple[Step, ...]:
    return tuple((action,) for action in actions)


def _eight_phases(
    i: int, half: int, batches: int, near: tuple[int, int], far: tuple[int, int]
) -> tuple[Step, ...]:
    """The steps of a rank that is `i` ranks from the end, of which `half` lie up to the middle.

    `near` and `far` are its two stages, each with the number of its first micro-batch: of those
    that come from the near end and those that have passed the middle (0 and 1 in the code).
    """
    middle = i == half - 1
    behind = half - i - 1
    take = _Takes(near, far)
    steps: list[Step] = []
    steps += [take(0, "F") for _ in range(2 * behind)]
    for _ in range(i + 1):
        steps += [take(0, "F"), take(1, "F")]
    for _ in range(behind):
        steps += [take(1, "I"), take.weight(), take(1, "F")]
    for n in range(batches - 2 * half + i + 1):
        forward, backward = take(0, "F"), take(1, "B")
        # In the middle the very first pair would have to wait for itself.
        steps += [forward, backward] if n == 0 and middle else [forward + backward]
        steps.append(take(1, "F") + take(0, "B"))
    for _ in range(behind):
        steps += [take(1, "B"), take(1, "F") + take(0, "B")]
    cut = (i + 1) // 2
    for n in range(i + 1):
        # From the middle of this phase on weight gradients wait.
        steps.append(take(1, "I" if n > cut or (n == cut and i % 2) else "B"))
        steps.append(take(0, "I" if n >= cut else "B"))
    for _ in range(behind):
        steps += [take.weight(), take(0, "I")]
    steps += [take.weight() for _ in range(i + 1)]
    return tuple(steps)


class _Takes:
    """Numbers chunks in the order in which they are taken, and weight gradients as they wait."""

    def __init__(self, near: tuple[int, int], far: tuple[int, int]) -> None:
        self.stages = (near[0], far[0])
        self.next: dict[tuple[int, str], Iterator[int]] = {
            (side, way): count(first)
            for side, (_, first) in enumerate((near, far))
            for way in ("forward", "backward")
        }
        self.waiting: list[Action] = []

    def __call__(self, side: int, kind: str) -> Step:
        way = "forward" if kind == "F" else "backward"
        action = Action(kind, self.stages[side], next(self.next[side, way]))
        if kind == "I":
            self.waiting.append(Action("W", action.stage, action.batch))
        return (action,)

    def weight(self) -> Step:
        return (self.waiting.pop(0),)


def with_transfers(given: Schedule) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank with what it receives before a chunk and sends after it."""
    return tuple(tuple(_transfers(given, steps, rank)) for rank, steps in enumerate(given.ranks))


def _transfers(given: Schedule, steps: tuple[Step, ...], rank: int) -> Iterator[Action]:
    def elsewhere(stage: int, batch: int) -> bool:
        return 0 <= stage < given.stages and given.holder(stage, batch) != rank

    for step in steps:
        works = [(a, 1 if a.kind == "F" else -1, "F" if a.kind == "F" else "B") for a in step]
        works = [work for work in works if work[0].kind != "W"]
        for a, way, letter in works:
            if elsewhere(a.stage - way, a.batch):
                yield Action(f"RECV_{letter}", a.stage, a.batch)
        yield from step
        for a, way, letter in works:
            if elsewhere(a.stage + way, a.batch):
                yield Action(f"SEND_{letter}", a.stage, a.batch)
