"""Whether a schedule can be run: complete, in order, and without ranks that wait for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compiler.plan.schedule import Chunk, Entry, Message, Receive, Schedule, Send, word
from compiler.plan.simulate import ChunkCosts, simulate


def problems(given: Schedule) -> list[str]:
    """What is wrong with a schedule and its transfers; nothing if it can be run.

    Every chunk is computed once, forward and backward, by the rank that holds its stage. Every
    message is sent and received once, in ascending numbers, and before the chunk that reads it; and
    ranks do not wait for one another even if every send waits for its receiver.
    """
    found = []
    seen: Counter[tuple[str, int, int]] = Counter()
    for rank in range(len(given.rows)):
        for chunk in (a for step in given.steps(rank) for a in step):
            seen.update(_computed(chunk))
            if given.holder(chunk.stage, chunk.batch) != rank:
                found.append(f"{chunk} is on rank {rank}, which does not hold the stage")
    for stage in range(given.stages):
        for batch in range(given.batches):
            times = {kind: seen.pop((kind, stage, batch), 0) for kind in "FIW"}
            found += [f"{stage}{k}{batch} is done {n} times" for k, n in times.items() if n != 1]
    found += [f"{stage}{kind}{batch} is not part of it" for kind, stage, batch in seen]
    try:
        simulate(given, ChunkCosts())
    except ValueError as error:
        found.append(str(error))
    found = found or list(_transfer_problems(given))
    if not found and (waiting := blocked(given)):
        found.append(f"ranks wait for one another: {', '.join(waiting)}")
    return found


def _computed(chunk: Chunk) -> Iterator[tuple[str, int, int]]:
    """A forward pass, gradients of inputs or those of weights; B is both kinds of gradients."""
    for kind in "IW" if chunk.kind == "B" else chunk.kind:
        yield kind, chunk.stage, chunk.batch


def _transfer_problems(given: Schedule) -> Iterator[str]:
    """Where rows do not hold what their chunks need of other ranks, in ascending numbers."""
    numbers = {message: number for number, message in enumerate(given.messages)}
    for rank, row in enumerate(given.rows):
        sent: set[int] = set()
        made: set[Message] = set()
        received: dict[tuple[str, int, int], int] = {}
        last = -1
        for entry in row:
            if isinstance(entry, tuple):
                made |= {message for chunk in entry if (message := given.message(chunk))}
                for chunk in entry:
                    if _from_elsewhere(chunk, given, rank) and chunk.reads not in received:
                        yield f"rank {rank} computes {chunk} before it receives what that reads"
                continue
            if entry.number <= last:
                yield f"rank {rank}: {word(entry)} after {last}, not in ascending numbers"
            last = entry.number
            message = given.messages[entry.number]
            if isinstance(entry, Receive) and message.receiver == rank:
                received[message.key] = entry.number
            elif isinstance(entry, Send) and message in made:
                sent.add(entry.number)
            else:
                yield f"rank {rank}: {word(entry)}, which it does not have or need"
        lost = [number for message in made if (number := numbers.get(message)) not in sent]
        yield from (f"rank {rank} does not send message {number}" for number in lost)


def _from_elsewhere(chunk: Chunk, given: Schedule, rank: int) -> bool:
    """Whether a chunk reads what another rank makes."""
    before = chunk.stage + (-1 if chunk.kind == "F" else 1)
    if chunk.kind == "W" or not 0 <= before < given.stages:
        return False
    return given.holder(before, chunk.batch) != rank


def blocked(given: Schedule, members: int = 1) -> list[str]:
    """Where ranks wait for ever if every send waits for its receive, and every receive for it.

    With `members` each pipeline rank stands for so many data ranks that all run its row, and that
    wait for one another in every step, as collectives inside of a chunk make them.
    """
    at = {(rank, m): 0 for rank in range(len(given.rows)) for m in range(members)}

    def entry(place: tuple[int, int]) -> Entry | None:
        row = given.rows[place[0]]
        return row[at[place]] if at[place] < len(row) else None

    ready = list(at)
    while ready:
        rank, member = place = ready.pop()
        here = entry(place)
        if here is None:
            continue
        if isinstance(here, tuple):
            together = [(rank, other) for other in range(members)]
        else:
            message = given.messages[here.number]
            together = [(message.sender, member), (message.receiver, member)]
        if all(_is_one(here, entry(other)) for other in together):
            for other in together:
                at[other] += 1
            ready += together
    left = [(place[0], e) for place in at if (e := entry(place)) is not None]
    return [*dict.fromkeys(f"rank {rank} at {word(e)}" for rank, e in left)]


def _is_one(a: Entry, b: Entry | None) -> bool:
    """Whether two entries are one operation: the same step, or both ends of a message."""
    if b is None or isinstance(a, tuple) or isinstance(b, tuple):
        return a == b
    return a.number == b.number
