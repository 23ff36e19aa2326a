"""What pipeline ranks send and receive, in an order in which none can wait for ever.

Every message of a step has a number: its place by the end of the chunk that makes it, the rank
and the chunk. Each rank sends and receives in ascending numbers, and receives a message before its
first chunk that ends later than the message was made. Then, with every operation blocking and one
queue for each rank, the earliest unfinished message can always be finished; and since all ranks of
a stage have one row, that holds for the collectives inside of chunks, too. Costs only choose the
order: no order of this kind can deadlock. Compare NVIDIA/nccl#784, pytorch/pytorch#172668.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter

from compiler.plan.greedy import schedule_of
from compiler.plan.schedule import Entry, Message, Receive, Schedule, Send
from compiler.plan.simulate import ChunkCosts, simulate


def executed_schedule(name: str, pipeline: int, batches: int) -> Schedule:
    """What the ranks of a step execute: `schedule_of` with all that they send and receive."""
    return with_transfers(schedule_of(name, pipeline, batches))


def with_transfers(given: Schedule, costs: ChunkCosts | None = None) -> Schedule:
    """The schedule with all that its ranks send and receive, in the order that `costs` give.

    Raises ValueError where ranks wait for one another even if no message takes time.
    """
    times = simulate(given, costs or ChunkCosts()).ranks
    # The entries of each rank with their ends; sorting is stable, so that of equal ends steps come
    # first, and messages are in the order of ranks and chunks.
    rows: list[list[tuple[float, Entry]]] = [[] for _ in given.rows]
    made: list[tuple[float, Message]] = []
    for rank, (row, own) in enumerate(zip(rows, times, strict=True)):
        for step, (_, end) in zip(given.steps(rank), own, strict=True):
            row.append((end, step))
            for chunk in step:
                message = given.message(chunk)
                if message is not None:
                    made.append((end, message))
    made.sort(key=_end)
    for number, (end, message) in enumerate(made):
        rows[message.sender].append((end, Send(number)))
        rows[message.receiver].append((end, Receive(number)))
    return replace(
        given,
        rows=tuple([tuple([entry for _, entry in sorted(row, key=_end)]) for row in rows]),
        messages=tuple([message for _, message in made]),
    )


_end = itemgetter(0)


def most_held(
    given: Schedule,
    rank: int,
    saved: Mapping[int, int],
    message: int,
    operands: Mapping[int, int],
) -> int:
    """The most bytes that a rank holds between two entries of its row.

    `saved` are those that a stage saves of a micro-batch, until its gradients of inputs are done;
    `operands` those of products that then wait for its chunk W; `message` those of a message, from
    when it was made until it is sent, or received until it is read: what a stage received is part
    of what it saves.
    """
    now = most = 0
    arriving = {one.key for one in given.messages if one.receiver == rank}
    for entry in given.rows[rank]:
        if isinstance(entry, tuple):
            for chunk in entry:
                now += message * ((given.message(chunk) is not None) - (chunk.reads in arriving))
                now += saved[chunk.stage] * ((chunk.kind == "F") - (chunk.kind in "BI"))
                now += operands[chunk.stage] * ((chunk.kind == "I") - (chunk.kind == "W"))
                most = max(most, now)
        else:
            now += message if isinstance(entry, Receive) else -message
            most = max(most, now)
    return most
