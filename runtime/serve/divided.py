"""Ranks of which one answers and the others compute prompts: what `--prefill-ranks` starts.

Rank 0 is the server, and holds the decode engine. It sends each request to the rank that has fewest
prompts, which sends back the first token and the blocks of the prompt.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from .engine import Engine
from .group import Group, RankFailure, end_now
from .handoff import Abort, Ask, DecodeEngine, Gloo, Handoff, Message, PrefillEngine
from .ranks import leave_signals_to_server
from .request import Event, Sampling
from .worker import Stats

IDLE = 0.001
"""Seconds until an engine without work looks again for what has arrived."""


@dataclass(frozen=True)
class Wires:
    """Between rank 0 and one that computes prompts: requests one way, prompts the other."""

    asks: Gloo
    prompts: Gloo

    def close(self) -> None:
        self.asks.close()
        self.prompts.close()


def connect(group: Group, patience: float) -> list[Wires]:
    """Of rank 0 the wires to all others, of another that to rank 0. They fail where nothing comes
    for `patience` seconds, not even a sign of life."""
    found = []
    limit = timedelta(seconds=patience)
    for rank in range(1, group.size):
        # A group for each direction: threads wait in each of them.
        ways = [dist.new_group([0, rank], timeout=limit, backend="gloo") for _ in range(2)]
        if group.rank in (0, rank):
            other = rank if group.rank == 0 else 0
            asks = Gloo(ways[0], other, sends=group.rank == 0)
            found.append(Wires(asks, Gloo(ways[1], other, sends=group.rank != 0)))
    return found


class Divided:
    """Rank 0: what `worker.Engine` asks for, of a decode engine and the ranks that compute
    prompts."""

    heartbeat: float | None = 1.0
    """So that a rank that has ended is found out."""

    def __init__(self, engine: Engine, wires: Sequence[Wires], close: Callable[[], None]) -> None:
        self.decode = DecodeEngine(engine, self)
        self.max_model_len, self.vocab_size = engine.max_model_len, engine.vocab_size
        self._wires, self._close = wires, close
        self._prompts: list[set[str]] = [set() for _ in wires]
        """The requests whose prompts each rank computes."""
        self._running: set[str] = set()
        self._aborted: set[str] = set()
        self._elsewhere = dict.fromkeys(("prompt_tokens", "cached_tokens", "generated_tokens"), 0)
        """What other ranks computed."""

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """To the rank that has fewest prompts. Raises ValueError as an engine does."""
        if id in self._running:
            raise ValueError(f"there is a request {id!r} already")
        self.decode.engine.check(id, prompt, sampling, salt)
        rank = min(range(len(self._wires)), key=lambda i: len(self._prompts[i]))
        self._tell(rank, Ask(id, tuple(prompt), sampling, salt))
        self._prompts[rank].add(id)
        self._running.add(id)
        self._elsewhere["prompt_tokens"] += len(prompt)

    def abort(self, id: str) -> None:
        """Wherever the request is: here, on a rank, or on the way."""
        if id in self._running:
            self._aborted.add(id)
            for rank, prompts in enumerate(self._prompts):
                if id in prompts:
                    self._tell(rank, Abort(id))
            self.decode.abort(id)

    def _tell(self, rank: int, message: Ask | Abort) -> None:
        with suppress(RuntimeError):  # the next step says that it has ended
            self._wires[rank].asks.send(message)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def step(self) -> list[Event]:
        """A step of the decode engine. Raises RankFailure where a rank has ended."""
        try:
            events = self.decode.step()
        except RuntimeError as error:
            if not any(one.failed for wires in self._wires for one in (wires.asks, wires.prompts)):
                raise
            # The threads of a group that has lost a rank abort the process when they are ended.
            atexit.register(os._exit, 1)
            raise RankFailure(str(error)) from None
        for event in events:
            if event.finish is not None:
                self._running.discard(event.id)
                self._aborted.discard(event.id)
            elif event.id in self._aborted:  # it was on the way when its client left
                self.decode.abort(event.id)
        if not events and not self.decode.engine.busy:
            time.sleep(IDLE)
        return events

    def receive(self) -> list[Message]:
        """What has arrived from all ranks."""
        found = []
        for wires, prompts in zip(self._wires, self._prompts, strict=True):
            for message in wires.prompts.receive():
                if isinstance(message, Handoff):
                    prompts.discard(message.asked.id)
                    self._elsewhere["cached_tokens"] += message.event.cached
                    self._elsewhere["generated_tokens"] += len(message.event.tokens)
                found.append(message)
        return found

    def stats(self) -> Stats:
        """Those of the decode engine, and of what came to it; who is not there yet waits."""
        waiting = sum(map(len, self._prompts)) + self.decode.arriving
        found = self.decode.engine.stats()
        more = {**self._elsewhere, "waiting": waiting}
        return {name: value + more.get(name, 0) for name, value in found.items()}

    def close(self) -> None:
        for wires in self._wires:
            wires.close()
        self._close()


def make_divided(patience: float, make: Callable[[], Engine]) -> Divided:
    """Rank 0, in the process of the engine. Raises ValueError for what cannot be served."""
    group = Group.of_torchrun(patience)
    assert group is not None
    with group.telling():
        engine = make()
        group.meet()
        return Divided(engine, connect(group, patience), group.close)


def compute_prompts(patience: float, make: Callable[[], Engine]) -> None:
    """Another rank: returns when rank 0 ends; where a rank fails, the process ends with status 1.

    Raises ValueError for what cannot be served.
    """
    group = Group.of_torchrun(patience)
    assert group is not None
    try:
        with group.telling():
            engine = make()
            group.meet()
            (wires,) = connect(group, patience)
            leave_signals_to_server()
            follow_asks(PrefillEngine(engine, wires.prompts), wires)
        group.close()
    except RankFailure as error:
        end_now(error)


def follow_asks(prefill: PrefillEngine, wires: Wires) -> None:
    """Computes the prompts that rank 0 asks for, until it says that there are no more."""
    try:
        while not wires.asks.closed:
            for message in wires.asks.receive():
                if isinstance(message, Ask):
                    prefill.ask(message)
                elif isinstance(message, Abort):
                    prefill.abort(message.id)
            if prefill.busy:
                prefill.step()
            else:
                time.sleep(IDLE)
    except RuntimeError as error:
        if wires.asks.failed or wires.prompts.failed:
            raise RankFailure(str(error)) from None
        raise
    wires.close()
