"""How long a schedule takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Protocol

from compiler.plan.schedule import Schedule, Step


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
        times = self._times
        return sum([times[kind] for kind, _, _ in step])

    @cached_property
    def _times(self) -> Mapping[str, float]:
        both = self.input + self.weight
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": both}


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
    done = _Done(given, costs.transfer)
    times: list[list[tuple[float, float]]] = [[] for _ in given.rows]
    rows = [given.steps(rank) for rank in range(len(given.rows))]
    moved = True
    while moved:
        moved = False
        for own, steps in zip(times, rows, strict=True):
            free = own[-1][1] if own else 0.0
            for step in steps[len(own) :]:
                start = max(done.ready(step), free)
                if start == inf:
                    break
                free = start + costs.of(step)
                own.append((start, free))
                done.add(step, free)
                moved = True
    waiting = [
        f"rank {rank} at {'&'.join(map(str, steps[len(times[rank])]))}"
        for rank, steps in enumerate(rows)
        if len(times[rank]) < len(steps)
    ]
    if waiting:
        raise ValueError(f"ranks wait for one another: {', '.join(waiting)}")
    return Timeline(tuple(map(tuple, times)))


class _Done:
    """When results and gradients of inputs are there, by stage and micro-batch; inf: not yet.

    What the first stage reads forward, and the last one backward, is there at 0: stage -1 of
    `forward`, and one more stage of `gradient`.
    """

    def __init__(self, given: Schedule, transfer: float) -> None:
        stages, batches = given.stages, given.batches
        self.forward = [[inf] * batches for _ in range(stages)] + [[0.0] * batches]
        self.gradient = [[inf] * batches for _ in range(stages)] + [[0.0] * batches]
        # For each micro-batch what its message from each stage to the next one, or back, takes.
        directions = [
            [*(transfer * (a != b) for a, b in pairwise(ranks)), 0.0] for ranks in given.placement
        ]
        self.message = [directions[i * len(directions) // batches] for i in range(batches)]

    def ready(self, step: Step) -> float:
        """When all that a step reads is there."""
        found = 0.0
        for kind, stage, batch in step:
            if kind == "F":
                read = self.forward[stage - 1][batch] + self.message[batch][stage - 1]
            elif kind == "W":
                read = self.gradient[stage][batch]
            else:
                read = self.gradient[stage + 1][batch] + self.message[batch][stage]
                read = max(read, self.forward[stage][batch])
            if read > found:
                found = read
        return found

    def add(self, step: Step, end: float) -> None:
        """Records that a step is done."""
        for kind, stage, batch in step:
            if kind == "F":
                self.forward[stage][batch] = end
            elif kind != "W":
                self.gradient[stage][batch] = end
