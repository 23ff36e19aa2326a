"""An engine on each of several ranks, and rank 0, which hands requests to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .engine import Engine
from .group import Group
from .lockstep import Lockstep
from .rebalance import Rebalance
from .request import Event, Sampling
from .worker import EXPERT_LOAD, Stats

Message = tuple[Any, ...]
"""`add` or `abort`, and what the method of the engine takes."""
USAGE = "kv_cache_usage"


class RankEngine:
    """The engine of one rank, whose steps are those of all."""

    def __init__(
        self, engine: Engine, model: Lockstep, group: Group | None, rebalance: Rebalance
    ) -> None:
        self.engine, self.model, self.group, self.rebalance = engine, model, group, rebalance
        model.finish()  # what making the engine computed
        for layer in model.layers:
            layer.take_load()

    def step(self, messages: Sequence[Message], take_loads: bool) -> tuple[list[Event], Stats]:
        """What a step brought to the requests of this rank, and its numbers after it."""
        for name, *given in messages:
            getattr(self.engine, name)(*given)
        events = self.engine.step()
        self.model.finish()
        self.rebalance.step(take_loads)
        return events, self.engine.stats()


def follow(rank: RankEngine) -> None:
    """Steps whenever rank 0 does, until it says that there is no further one."""
    assert rank.group is not None
    command: tuple[list[list[Message]], bool] | None
    while (command := rank.group.broadcast()) is not None:
        messages, take_loads = command
        rank.group.gather(rank.step(messages[rank.group.rank], take_loads))


class Front:
    """Rank 0: what `worker.Engine` asks for, of the engines of all ranks."""

    heartbeat: float | None = 1.0
    """So that ranks know of each other that they are there."""

    def __init__(self, rank: RankEngine) -> None:
        self.rank, self.group = rank, rank.group
        self.max_model_len, self.vocab_size = rank.engine.max_model_len, rank.engine.vocab_size
        self._ranks = 1 if self.group is None else self.group.size
        self._messages: list[list[Message]] = [[] for _ in range(self._ranks)]
        self._rank_of: dict[str, int] = {}
        self._stats: list[Stats] = [rank.engine.stats()] * self._ranks

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """To the rank that has fewest. Raises ValueError as an engine does."""
        if id in self._rank_of:
            raise ValueError(f"there is a request {id!r} already")
        self.rank.engine.check(id, prompt, sampling, salt)
        held = list(self._rank_of.values())
        rank = min(range(self._ranks), key=held.count)
        self._rank_of[id] = rank
        self._messages[rank].append(("add", id, tuple(prompt), sampling, salt))

    def abort(self, id: str) -> None:
        rank = self._rank_of.get(id)
        if rank is not None:
            self._messages[rank].append(("abort", id))

    @property
    def busy(self) -> bool:
        return bool(self._rank_of)

    def step(self) -> list[Event]:
        """A step of all ranks. Raises RankFailure where one does not follow."""
        messages, self._messages = self._messages, [[] for _ in range(self._ranks)]
        command = messages, self.rank.rebalance.due(idle=not self.busy)
        if self.group is None:
            found = [self.rank.step(messages[0], command[1])]
        else:
            try:
                self.group.broadcast(command)
                found = self.group.gather(self.rank.step(messages[0], command[1]))
            except Exception as error:
                self.group.fail(error)
                raise
        self._stats = [stats for _, stats in found]
        events = [event for some, _ in found for event in some]
        for event in events:
            if event.finish is not None:
                del self._rank_of[event.id]
        return events

    def stats(self) -> Stats:
        """Sums over all ranks, the mean use of caches, and how even the loads of experts are."""
        sums = {name: sum(one[name] for one in self._stats) for name in self._stats[0]}
        sums[USAGE] /= self._ranks
        loads = self.rank.rebalance.imbalances()
        return sums | {EXPERT_LOAD + name: value for name, value in loads.items()}

    def close(self) -> None:
        if self.group is not None:
            self.group.broadcast(None)
            self.group.close()
