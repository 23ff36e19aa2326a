"""A schedule over the placement of any other, for fewer micro-batches than that one needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from compiler.parallel.layout import placement
from compiler.plan.schedule import Chunk, Schedule, Step, schedule
from compiler.plan.simulate import ChunkCosts

COSTS = ChunkCosts()


def schedule_of(name: str, pipeline: int, batches: int) -> Schedule:
    """The schedule by that name, or for too few micro-batches a greedy one over its placement.

    Raises ValueError where micro-batches cannot be dealt to the directions in equal parts.
    """
    try:
        return schedule(name, pipeline, batches)
    except ValueError:
        return greedy(name, pipeline, batches)


def greedy(name: str, pipeline: int, batches: int) -> Schedule:
    """Each rank computes what it can begin first, and of several chunks one backward.

    A stage keeps activations of no more micro-batches than there are stages from it to the last,
    as with 1F1B (arXiv 2104.04473, section 2.2), so that none takes more memory than in a step of
    full size. Raises ValueError where `batches` cannot be dealt to the directions in equal parts.
    """
    where = placement(name, pipeline)
    if batches % len(where):
        raise ValueError(f"{batches} micro-batches cannot be dealt to {len(where)} directions")
    each = batches // len(where)
    tracks: list[list[_Track]] = [[] for _ in range(pipeline)]
    for way, direction in enumerate(where):
        for stage, rank in enumerate(direction):
            tracks[rank].append(
                _Track(rank, stage, len(direction) - 1, way * each, (way + 1) * each)
            )
    ends: dict[Chunk, float] = {}
    free = [0.0] * pipeline
    rows: list[list[Step]] = [[] for _ in range(pipeline)]
    first: dict[int, _Candidate] = {}  # by rank, of those that can begin a chunk
    changed = set(range(pipeline))
    for _ in range(2 * batches * len(where[0])):
        for rank in changed:
            found = [
                (max(free[rank], ready), rank, chunk, one)
                for one in tracks[rank]
                for chunk, ready in one.ready(ends)
            ]
            first.pop(rank, None)
            if found:
                first[rank] = min(found)
        start, rank, chunk, track = min(first.values())
        free[rank] = ends[chunk] = start + COSTS.of((chunk,))
        rows[rank].append((chunk,))
        track.next[chunk.kind] += 1
        # What ranks of the neighbouring stages can begin may have changed, and nothing else.
        direction = where[chunk.batch // each]
        changed = {rank, *direction[max(0, track.stage - 1) : track.stage + 2]}
    return Schedule(name, batches, where, tuple(map(tuple, rows)))


@dataclass(order=True)
class _Track:
    """A stage for the micro-batches `first` to `end` of one direction, which go in order."""

    rank: int
    stage: int
    last: int  # the last stage
    first: int
    end: int
    next: dict[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.next = {"F": self.first, "B": self.first}

    def ready(self, ends: dict[Chunk, float]) -> list[tuple[Chunk, float]]:
        """The next forward and backward chunk, with the time when all that they read is there."""
        found = []
        forward, backward = (Chunk(kind, self.stage, self.next[kind]) for kind in "FB")
        kept = forward.batch - backward.batch
        if forward.batch < self.end and kept <= self.last - self.stage:
            before = Chunk("F", self.stage - 1, forward.batch)
            if self.stage == 0 or before in ends:
                found.append((forward, ends.get(before, 0.0)))
        if kept:
            before = Chunk("B", self.stage + 1, backward.batch)
            if self.stage == self.last or before in ends:
                own = ends[Chunk("F", self.stage, backward.batch)]
                found.append((backward, max(own, ends.get(before, 0.0))))
        return found


# When a rank can begin a chunk, the rank, and the chunk of which track.
_Candidate = tuple[float, int, Chunk, _Track]
