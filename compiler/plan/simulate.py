"""How long a schedule takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from compiler.plan.schedule import Chunk, Schedule, Step


class Durations(Protocol):
    """How long steps take, and messages between ranks, in one unit."""

    @property
    def transfer(self) -> float: ...

    def of(self, step: Step) -> float: ...


@dataclass(frozen=True)
class ChunkCosts:
    """Times of a chunk: forward, gradients of inputs, gradients of weights; in any unit.

    `pair` is that of a forward and a backward chunk that are overlapped; None: no less than both.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    pair: float | None = None
    transfer: float = 0.0

    def of(self, step: Step) -> float:
        if len(step) > 1 and self.pair is not None:
            return self.pair
        times = {
            "F": self.forward,
            "I": self.input,
            "W": self.weight,
            "B": self.input + self.weight,
        }
        return sum(times[chunk.kind] for chunk in step)


@dataclass(frozen=True)
class Timeline:
    """When each rank begins and ends each of its steps, from 0 on."""

    ranks: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def end(self) -> float:
        return max(times[-1][1] for times in self.ranks if times)

    def bubble(self, rank: int) -> float:
        """For how long a rank does nothing, until the last one is done."""
        return self.end - sum(end - start for start, end in self.ranks[rank])


def simulate(given: Schedule, costs: Durations) -> Timeline:
    """Runs a schedule: each step begins when its rank is free and what it reads is there.

    A message to another rank takes `costs.transfer`, beside all computing. Raises ValueError with
    the steps that all ranks wait at, if they wait for one another.
    """
    done: dict[tuple[str, int, int], float] = {}
    times: list[list[tuple[float, float]]] = [[] for _ in given.rows]
    rows = [given.steps(rank) for rank in range(len(given.rows))]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(rows):
            while len(times[rank]) < len(steps):
                step = steps[len(times[rank])]
                ready = _ready(step, given, done, costs.transfer)
                if ready is None:
                    break
                start = max(ready, times[rank][-1][1] if times[rank] else 0.0)
                end = start + costs.of(step)
                times[rank].append((start, end))
                done |= {key: end for chunk in step for key in gives(chunk)}
                moved = True
    waiting = [
        f"rank {rank} at {'&'.join(map(str, steps[len(times[rank])]))}"
        for rank, steps in enumerate(rows)
        if len(times[rank]) < len(steps)
    ]
    if waiting:
        raise ValueError(f"ranks wait for one another: {', '.join(waiting)}")
    return Timeline(tuple(map(tuple, times)))


def gives(chunk: Chunk) -> Iterator[tuple[str, int, int]]:
    """What is there when an chunk is done: a result, a gradient of inputs, of weights."""
    for letter in {"B": "IW"}.get(chunk.kind, chunk.kind):
        yield letter, chunk.stage, chunk.batch


def _reads(chunk: Chunk, stages: int) -> Iterator[tuple[str, int, int]]:
    stage, batch = chunk.stage, chunk.batch
    if chunk.kind == "F":
        if stage > 0:
            yield "F", stage - 1, batch
    elif chunk.kind == "W":
        yield "I", stage, batch
    else:
        yield "F", stage, batch
        if stage < stages - 1:
            yield "I", stage + 1, batch


def _ready(
    step: Step, given: Schedule, done: dict[tuple[str, int, int], float], transfer: float
) -> float | None:
    """When all that a step reads is there; None while something is not."""
    found = 0.0
    for chunk in step:
        here = given.holder(chunk.stage, chunk.batch)
        for key in _reads(chunk, given.stages):
            if key not in done:
                return None
            sent = given.holder(key[1], key[2]) != here
            found = max(found, done[key] + (transfer if sent else 0.0))
    return found
