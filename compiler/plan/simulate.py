"""Whether a schedule can be run, how long that takes, and how much it has under way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from compiler.plan.schedule import Action, Schedule, Step, with_transfers


@dataclass(frozen=True)
class Costs:
    """Times of a chunk: forward, gradients of inputs, gradients of weights; in any unit.

    `pair` is that of a forward and a backward chunk that are overlapped; None: no less than both.
    """

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    pair: float | None = None

    def of(self, step: Step) -> float:
        if len(step) > 1 and self.pair is not None:
            return self.pair
        times = {
            "F": self.forward,
            "I": self.input,
            "W": self.weight,
            "B": self.input + self.weight,
        }
        return sum(times[action.kind] for action in step)


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


def simulate(given: Schedule, costs: Costs) -> Timeline:
    """Runs a schedule: each step begins when its rank is free and what it reads is there.

    Transfers take no time. Raises ValueError with the steps that all ranks wait at, if they wait
    for one another.
    """
    done: dict[tuple[str, int, int], float] = {}
    times: list[list[tuple[float, float]]] = [[] for _ in given.ranks]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(given.ranks):
            while len(times[rank]) < len(steps):
                step = steps[len(times[rank])]
                ready = _ready(step, given, done)
                if ready is None:
                    break
                start = max(ready, times[rank][-1][1] if times[rank] else 0.0)
                end = start + costs.of(step)
                times[rank].append((start, end))
                done |= {key: end for action in step for key in _gives(action)}
                moved = True
    waiting = [
        f"rank {rank} at {'&'.join(map(str, steps[len(times[rank])]))}"
        for rank, steps in enumerate(given.ranks)
        if len(times[rank]) < len(steps)
    ]
    if waiting:
        raise ValueError(f"ranks wait for one another: {', '.join(waiting)}")
    return Timeline(tuple(map(tuple, times)))


def _gives(action: Action) -> Iterator[tuple[str, int, int]]:
    """What is there when an action is done: a result, a gradient of inputs, of weights."""
    for letter in {"B": "IW"}.get(action.kind, action.kind):
        yield letter, action.stage, action.batch


def _reads(action: Action, stages: int) -> Iterator[tuple[str, int, int]]:
    stage, batch = action.stage, action.batch
    if action.kind == "F":
        if stage > 0:
            yield "F", stage - 1, batch
    elif action.kind == "W":
        yield "I", stage, batch
    else:
        yield "F", stage, batch
        if stage < stages - 1:
            yield "I", stage + 1, batch


def _ready(step: Step, given: Schedule, done: dict[tuple[str, int, int], float]) -> float | None:
    """When all that a step reads is there; None while something is not."""
    needed = [key for action in step for key in _reads(action, given.stages)]
    if any(key not in done for key in needed):
        return None
    return max((done[key] for key in needed), default=0.0)


def under_way(given: Schedule, rank: int) -> int:
    """For how many chunks a rank keeps activations at most: forward, and not all of backward."""
    most = now = 0
    for step in given.ranks[rank]:
        for action in step:
            now += (action.kind == "F") - (action.kind in "BW")
        # Of an overlapped pair the one begins before the other has ended.
        most = max(most, now + sum(action.kind in "BW" for action in step) * (len(step) > 1))
    return most


def problems(given: Schedule) -> list[str]:
    """What is wrong with a schedule; nothing if it can be run.

    Every chunk is computed once, forward and backward, by the rank that holds its stage; ranks do
    not wait for one another; and messages of one kind between two ranks are received in the order
    in which they are sent.
    """
    found = []
    seen: Counter[tuple[str, int, int]] = Counter()
    for rank, steps in enumerate(given.ranks):
        for action in (a for step in steps for a in step):
            seen.update(_gives(action))
            if given.holder(action.stage, action.batch) != rank:
                found.append(f"{action} is on rank {rank}, which does not hold the stage")
    for stage in range(given.stages):
        for batch in range(given.batches):
            times = {kind: seen.pop((kind, stage, batch), 0) for kind in "FIW"}
            found += [f"{stage}{k}{batch} is done {n} times" for k, n in times.items() if n != 1]
    found += [f"{stage}{kind}{batch} is not part of it" for kind, stage, batch in seen]
    try:
        simulate(given, Costs())
    except ValueError as error:
        found.append(str(error))
    return found or _out_of_order(given)


def _out_of_order(given: Schedule) -> list[str]:
    sent: dict[tuple[int, int, str], list[tuple[int, int]]] = defaultdict(list)
    received: dict[tuple[int, int, str], list[tuple[int, int]]] = defaultdict(list)
    for rank, actions in enumerate(with_transfers(given)):
        for action in actions:
            way, _, letter = action.kind.partition("_")
            if not letter:
                continue
            forth = 1 if letter == "F" else -1
            if way == "SEND":
                to = given.holder(action.stage + forth, action.batch)
                sent[rank, to, letter].append((action.stage + forth, action.batch))
            else:
                source = given.holder(action.stage - forth, action.batch)
                received[source, rank, letter].append((action.stage, action.batch))
    return [
        f"rank {b} receives {kind} from rank {a} in another order than they are sent"
        for a, b, kind in sorted(sent.keys() | received.keys())
        if sent[a, b, kind] != received[a, b, kind]
    ]
