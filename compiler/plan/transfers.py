"""What pipeline ranks send and receive, in an order in which none can wait for ever.

Every message of a step has a number: its place by the end of the chunk that makes it, the rank
and the chunk. Each rank sends and receives in ascending numbers, and receives a message before its
first chunk that ends later than the message was made. Then, with every operation blocking and one
queue for each rank, the earliest unfinished message can always be finished; and since all ranks of
a stage have one row, that holds for the collectives inside of chunks, too. Costs only choose the
order: no order of this kind can deadlock. Compare NVIDIA/nccl#784, pytorch/pytorch#172668.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compiler.plan.schedule import Entry, Receive, Schedule, Send, Step
from compiler.plan.simulate import ChunkCosts, simulate


def with_transfers(given: Schedule, costs: ChunkCosts | None = None) -> Schedule:
    """The schedule with all that its ranks send and receive, in the order that `costs` give.

    Raises ValueError where ranks wait for one another even if no message takes time.
    """
    ends = [[end for _, end in times] for times in simulate(given, costs or ChunkCosts()).ranks]
    # By the end of the chunk that makes it, its rank, and which of its rank's chunks that is.
    made = sorted(
        (end, rank, i, j, message)
        for rank, times in enumerate(ends)
        for i, (step, end) in enumerate(zip(given.steps(rank), times, strict=True))
        for j, chunk in enumerate(step)
        if (message := given.message(chunk)) is not None
    )
    own: list[list[tuple[float, Entry]]] = [[] for _ in given.rows]
    for number, (end, sender, _, _, message) in enumerate(made):
        own[sender].append((end, Send(number)))
        own[message.receiver].append((end, Receive(number)))
    steps = [given.steps(rank) for rank in range(len(given.rows))]
    rows = tuple(map(_row, steps, ends, own))
    return replace(given, rows=rows, messages=tuple([message for *_, message in made]))


def _row(
    steps: Sequence[Step], ends: Sequence[float], own: Sequence[tuple[float, Entry]]
) -> tuple[Entry, ...]:
    """The steps of a rank between its sends and receives, which are `own`, after their times."""
    row: list[Entry] = []
    at = 0
    for step, end in zip(steps, ends, strict=True):
        while at < len(own) and own[at][0] < end:
            row.append(own[at][1])
            at += 1
        row.append(step)
    return (*row, *(transfer for _, transfer in own[at:]))


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
