"""The order in which each pipeline rank works: forward and backward chunks of micro-batches.

A schedule is data: for each pipeline rank a row of steps. A chunk is one stage on one micro-batch;
its backward pass is whole (B), or cut into the gradients of inputs (I), for which the previous
stage waits, and those of weights (W), which can be computed later. `transfers.py` adds what ranks
send and receive, `simulate.py` checks and times schedules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count
from typing import ClassVar, NamedTuple

from compiler.parallel.layout import placement


class Chunk(NamedTuple):
    """F, B, I or W of a stage on a micro-batch."""

    kind: str
    stage: int
    batch: int

    @property
    def reads(self) -> tuple[str, int, int] | None:
        """The `key` of the message that it reads if that comes from another rank."""
        kind, stage, batch = self
        return None if kind == "W" else ("F" if kind == "F" else "B", stage, batch)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.batch}"


Step = tuple[Chunk, ...]
"""One chunk, or a forward and a backward chunk that are computed as one, each hiding the
communication of the other."""


@dataclass(slots=True)
class Send:
    """The rank sends the message of this number."""

    number: int
    verb: ClassVar[str] = "send"


@dataclass(slots=True)
class Receive:
    """The rank receives the message of this number."""

    number: int
    verb: ClassVar[str] = "receive"


Entry = Step | Send | Receive


class Message(NamedTuple):
    """What `stage` reads of a micro-batch from another pipeline rank.

    F: what the previous stage sends, B: the gradients that the next stage sends back.
    """

    kind: str
    stage: int
    batch: int
    sender: int
    receiver: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.kind, self.stage, self.batch


@dataclass(frozen=True)
class Schedule:
    """The row of each pipeline rank.

    `placement` has for each direction the pipeline rank of each stage; micro-batches are dealt to
    the directions in equal parts, in order. A message's number is its place in `messages`; there
    are none, and no entries of them in `rows`, before `transfers.with_transfers` has added them.
    """

    name: str
    batches: int
    placement: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[Entry, ...], ...]
    messages: tuple[Message, ...] = ()

    @property
    def stages(self) -> int:
        return len(self.placement[0])

    def holder(self, stage: int, batch: int) -> int:
        """The pipeline rank that holds a stage for a micro-batch."""
        return self.directions[batch][stage]

    @cached_property
    def directions(self) -> list[tuple[int, ...]]:
        """For each micro-batch the pipeline rank of each stage."""
        ways = len(self.placement)
        return [self.placement[batch * ways // self.batches] for batch in range(self.batches)]

    def message(self, chunk: Chunk) -> Message | None:
        """What a chunk makes for another pipeline rank, if it does."""
        kind, stage, batch = chunk
        if kind == "W":
            return None
        target = stage + (1 if kind == "F" else -1)
        direction = self.directions[batch]
        if not 0 <= target < len(direction):
            return None
        sender, receiver = direction[stage], direction[target]
        if sender == receiver:
            return None
        return Message("F" if kind == "F" else "B", target, batch, sender, receiver)

    def steps(self, rank: int) -> tuple[Step, ...]:
        """What a pipeline rank computes, without what it sends and receives."""
        return tuple([entry for entry in self.rows[rank] if isinstance(entry, tuple)])

    def __str__(self) -> str:
        """A line for each rank, a word for each step."""
        lines = (" ".join(map(word, self.steps(rank))) for rank in range(len(self.rows)))
        return "".join(f"rank {i}: {line}\n" for i, line in enumerate(lines))

    def to_json(self) -> str:
        """One line for each row and message; `schedule_from_json` reads it."""
        values = {
            "name": self.name,
            "micro_batches": self.batches,
            "placement": self.placement,
            "message": Message._fields,
            "messages": self.messages,
            "rows": [[word(entry) for entry in row] for row in self.rows],
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        return ("{\n" + ",\n".join(lines) + "\n}\n").replace("], [", "],\n[")


def word(entry: Entry) -> str:
    """An entry of a row as texts say it: `3F2`, `3F2&0B1`, `send 7`."""
    if isinstance(entry, tuple):
        return "&".join([f"{stage}{kind}{batch}" for kind, stage, batch in entry])
    return f"{entry.verb} {entry.number}"


def schedule_from_json(text: str) -> Schedule:
    """The schedule that `Schedule.to_json` wrote. Raises ValueError where it is none."""
    try:
        values = json.loads(text)
        return Schedule(
            str(values["name"]),
            int(values["micro_batches"]),
            tuple(tuple(map(int, stages)) for stages in values["placement"]),
            tuple(tuple(map(_entry, row)) for row in values["rows"]),
            tuple(Message(str(kind), *map(int, rest)) for kind, *rest in values["messages"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no schedule: {error}") from None


def _entry(word: str) -> Entry:
    transfer = re.fullmatch(r"(send|receive) (\d+)", word)
    if transfer:
        return (Send if transfer[1] == "send" else Receive)(int(transfer[2]))
    chunks = [re.fullmatch(r"(\d+)([FBIW])(\d+)", part) for part in word.split("&")]
    if not all(chunks):
        raise ValueError(f"{word!r} is no entry of a schedule")
    return tuple(Chunk(m[2], int(m[1]), int(m[3])) for m in chunks if m)


@cache
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
        steps = [Chunk("F", rank, i) for i in range(warm)]
        for i in range(batches):
            steps.append(Chunk("B", rank, i))
            if warm + i < batches:
                steps.append(Chunk("F", rank, warm + i))
        ranks.append(_one_by_one(steps))
    return _schedule("1f1b", batches, ranks)


def zero_bubble(pipeline: int, batches: int) -> Schedule:
    """ZB1P (ZB-H1): 1F1B in which weight gradients wait until there is nothing else to do.

    Rank r is r weight gradients behind, so that it keeps what `pipeline` micro-batches need, as
    the first rank does with 1F1B, if weight gradients need as much as was saved. arXiv 2401.10241,
    section 2.
    """
    ranks = []
    for rank in range(pipeline):
        warm = min(batches, pipeline - rank)
        steps = [Chunk("F", rank, i) for i in range(warm)]
        for i in range(batches):
            steps.append(Chunk("I", rank, i))
            if i >= rank:
                steps.append(Chunk("W", rank, i - rank))
            if warm + i < batches:
                steps.append(Chunk("F", rank, warm + i))
        steps += [Chunk("W", rank, i) for i in range(max(0, batches - rank), batches)]
        ranks.append(_one_by_one(steps))
    return _schedule("zero_bubble", batches, ranks)


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
    ranks = []
    for rank in range(pipeline):
        first = (rank, 0), (last - rank, half)
        # For each rank the near direction is that whose first stages are on its side.
        near, far = first if rank < pipeline // 2 else first[::-1]
        from_end = min(rank, last - rank)
        ranks.append(_eight_phases(from_end, pipeline // 2, half, near, far))
    return _schedule("dualpipe", batches, ranks)


def dual_pipe_v(pipeline: int, batches: int) -> Schedule:
    """DualPipeV: half of DualPipe, in which the pipeline turns back at the last rank.

    Rank r holds the stages r and 2 * pipeline - 1 - r. The order is that of DeepSeek's code.
    """
    if batches < 2 * pipeline:
        raise ValueError(f"dualpipe_v needs at least {2 * pipeline} micro-batches, not {batches}")
    stages = 2 * pipeline
    ranks = [
        _eight_phases(rank, pipeline, batches, (rank, 0), (stages - 1 - rank, 0))
        for rank in range(pipeline)
    ]
    return _schedule("dualpipe_v", batches, ranks)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_forward_one_backward,
    "zero_bubble": zero_bubble,
    "dualpipe": dual_pipe,
    "dualpipe_v": dual_pipe_v,
}


def _schedule(name: str, batches: int, ranks: Sequence[tuple[Step, ...]]) -> Schedule:
    return Schedule(name, batches, placement(name, len(ranks)), tuple(ranks))


def _one_by_one(chunks: list[Chunk]) -> tuple[Step, ...]:
    return tuple((chunk,) for chunk in chunks)


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
        self.waiting: list[Chunk] = []

    def __call__(self, side: int, kind: str) -> Step:
        way = "forward" if kind == "F" else "backward"
        chunk = Chunk(kind, self.stages[side], next(self.next[side, way]))
        if kind == "I":
            self.waiting.append(Chunk("W", chunk.stage, chunk.batch))
        return (chunk,)

    def weight(self) -> Step:
        return (self.waiting.pop(0),)
