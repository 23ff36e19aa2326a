"""What pipeline ranks send and receive, in an order in which none can wait for ever.

Every message of a step has a number: its place by the end of the chunk that makes it, the rank
and the chunk. Each rank sends and receives in ascending numbers, and receives a message before its
first chunk that ends later than the message was made. Then, with every operation blocking and one
queue for each rank, the earliest unfinished message can always be finished; and since all ranks of
a stage have one row, that holds for the collectives inside of chunks, too. Costs only choose the
order: no order of this kind can deadlock. Compare NVIDIA/nccl#784, pytorch/pytorch#172668.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from compiler.plan.schedule import Entry, Message, Receive, Schedule, Send
from compiler.plan.simulate import ChunkCosts, simulate


def with_transfers(given: Schedule, costs: ChunkCosts | None = None) -> Schedule:
    """The schedule with all that its ranks send and receive, in the order that `costs` give.

    Raises ValueError where ranks wait for one another even if no message takes time.
    """
    ends = [[end for _, end in times] for times in simulate(given, costs or ChunkCosts()).ranks]
    made = sorted(_made(given, ends))
    own: list[list[int]] = [[] for _ in given.rows]
    for number, one in enumerate(made):
        own[one.sender].append(number)
        own[one.message.receiver].append(number)
    rows = (_row(given, rank, own[rank], made, ends[rank]) for rank in range(len(given.rows)))
    return replace(given, rows=tuple(rows), messages=tuple(one.message for one in made))


class _Made(NamedTuple):
    """A message after when the chunk that makes it ends, and which of its rank's chunks that is."""

    end: float
    sender: int
    chunk: tuple[int, int]
    message: Message


def _made(given: Schedule, ends: list[list[float]]) -> Iterator[_Made]:
    for rank in range(len(given.rows)):
        for i, step in enumerate(given.steps(rank)):
            for j, chunk in enumerate(step):
                message = given.message(chunk)
                if message is not None:
                    yield _Made(ends[rank][i], rank, (i, j), message)


def _row(
    given: Schedule, rank: int, own: list[int], made: list[_Made], ends: list[float]
) -> tuple[Entry, ...]:
    """The steps of a rank between its sends and receives, which are `own`."""
    row: list[Entry] = []
    left = iter(own)
    number = next(left, None)
    for step, end in zip(given.steps(rank), ends, strict=True):
        while number is not None and made[number].end < end:
            row.append(_transfer(made[number].message, number, rank))
            number = next(left, None)
        row.append(step)
    row += [_transfer(made[n].message, n, rank) for n in ([number] if number is not None else [])]
    row += [_transfer(made[n].message, n, rank) for n in left]
    return tuple(row)


def _transfer(message: Message, number: int, rank: int) -> Entry:
    return Send(number) if message.sender == rank else Receive(number)


def most_held(given: Schedule, rank: int, saved: Mapping[int, int], message: int) -> int:
    """The most bytes that a rank holds between two entries of its row.

    `saved` are those that a stage saves of a micro-batch, until its gradients are done; `message`
    those of a message, from when it was made until it is sent, or received until it is read: what a
    stage received is part of what it saves.
    """
    now = most = 0
    arriving = {one.key for one in given.messages if one.receiver == rank}
    for entry in given.rows[rank]:
        if isinstance(entry, tuple):
            for chunk in entry:
                now += message * ((given.message(chunk) is not None) - (chunk.reads in arriving))
                now += saved[chunk.stage] * ((chunk.kind == "F") - (chunk.kind in "BW"))
                most = max(most, now)
        else:
            now += message if isinstance(entry, Receive) else -message
            most = max(most, now)
    return most
