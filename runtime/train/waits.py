"""How long a rank waits for others; and where that never ends, a line that says for which."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread

from torch.distributed.distributed_c10d import Store
from torch.profiler import record_function

from .ranks import ProcessGroups

SLOWEST_TICK = 5.0
"""Seconds between two looks at what a rank does, at most."""


@dataclass(frozen=True)
class Wait:
    """An operation with others that has not ended; `ranks` are all that it needs."""

    what: str
    ranks: Sequence[int]
    since: float


class Waits:
    """What one rank waits for now, and for how many `seconds` it has waited so far."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.now: Wait | None = None
        self.chunk: object = None

    @contextmanager
    def computing(self, chunk: object) -> Iterator[None]:
        """Around a chunk, in which ranks may wait, too; or around a pair, and both its chunks."""
        around, self.chunk = self.chunk, self.chunk or chunk
        try:
            with record_function(str(chunk)):
                yield
        finally:
            self.chunk = around

    @contextmanager
    def waiting(self, what: str, ranks: Sequence[int]) -> Iterator[None]:
        """Around an operation that ends only when other ranks have come as far."""
        start = time.monotonic()
        self.now = Wait(what if self.chunk is None else f"{what} in {self.chunk}", ranks, start)
        try:
            with record_function(what):
                yield
        finally:
            self.now = None
            self.seconds += time.monotonic() - start


@dataclass(frozen=True)
class RankState:
    """What a rank told the others: its host, and for what it waits; None: it computes."""

    host: str
    what: str | None
    ranks: Sequence[int]

    @classmethod
    def of(cls, waits: Waits) -> RankState:
        now = waits.now
        if now is None:
            return cls(socket.gethostname(), None, ())
        return cls(socket.gethostname(), now.what, tuple(now.ranks))


def report(rank: int, seconds: float, states: Mapping[int, RankState], hosts: Sequence[str]) -> str:
    """One line on why `rank` waits, from what each rank told; ranks without a state are silent.

    Named is a rank that it waits for, maybe through others, and that itself does not wait: if there
    are several one that is silent, for it may have died.
    """
    found: list[tuple[bool, int, int]] = []
    seen, queue = {rank}, [rank]
    for one in queue:
        for other in states[one].ranks:
            if other in seen:
                continue
            seen.add(other)
            if other in states and states[other].what is not None:
                queue.append(other)
            else:
                found.append((other in states, other, one))
    if not found:
        return (
            f"rank {rank} on {hosts[rank]} has waited {seconds:.0f} s for ranks that wait, too: "
            f"{states[rank].what}"
        )
    alive, blamed, waiting = min(found)
    does = "goes on computing" if alive else "does not answer"
    return (
        f"rank {blamed} on {hosts[blamed]} {does}, and rank {waiting} on {hosts[waiting]} waits "
        f"for it, the first for {seconds:.0f} s: {states[waiting].what}"
    )


class HangReport:
    """Threads of one rank that end its process when ranks wait longer than `patience` seconds.

    The first rank that has waited so long asks all through the store, which all look at. It prints
    the line; all that can end with status 1, and torchrun ends the rest.
    """

    def __init__(self, waits: Waits, store: Store, rank: int, size: int, patience: float) -> None:
        self.waits, self.store, self.rank, self.size = waits, store, rank, size
        self.patience, self.tick = patience, min(SLOWEST_TICK, patience / 5)
        self.ended = Event()
        store.set(f"host {rank}", socket.gethostname())
        self.threads = [Thread(target=one, daemon=True) for one in (self._watch, self._answer)]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.ended.set()
        self.threads[0].join()

    def _watch(self) -> None:
        """Looks at this rank alone: the store itself may be on one that hangs."""
        while not self.ended.wait(self.tick):
            now = self.waits.now
            if now is None or time.monotonic() - now.since < self.patience:
                continue
            asking = Thread(target=self._ask, args=(now,), daemon=True)
            asking.start()
            asking.join(6 * self.tick)
            self._end(f"rank {self.rank} on {socket.gethostname()} waits for {now.what}")

    def _ask(self, now: Wait) -> None:
        """Collects what all ranks do and prints the line, unless another rank does so already."""
        with suppress(RuntimeError):  # the store has gone: `_watch` tells what this rank knows
            if self.store.add("asked", 1) > 1:
                time.sleep(8 * self.tick)  # `_answer` ends the process
                return
            time.sleep(3 * self.tick)
            states = {self.rank: RankState.of(self.waits)}
            for rank in range(self.size):
                if rank != self.rank and self.store.check([f"state {rank}"]):
                    states[rank] = RankState(**json.loads(self.store.get(f"state {rank}")))
            hosts = [self.store.get(f"host {rank}").decode() for rank in range(self.size)]
            line = report(self.rank, time.monotonic() - now.since, states, hosts)
            self.store.set("reported", "")
            self._end(line)

    def _answer(self) -> None:
        """Tells what this rank does once any has asked, and ends when that has reported."""
        with suppress(RuntimeError):  # the store ends with the rank or torchrun that has it
            while not self.ended.wait(self.tick):
                if self.store.check(["asked"]):
                    state = json.dumps(asdict(RankState.of(self.waits)))
                    self.store.set(f"state {self.rank}", state)
                    while not self.store.check(["reported"]):
                        time.sleep(self.tick)
                    self._end()

    def _end(self, line: str = "") -> None:
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits for ever


@contextmanager
def hang_report(waits: Waits, ranks: ProcessGroups, patience: float) -> Iterator[None]:
    """Ends all ranks where one waits longer than `patience` seconds for an operation."""
    if ranks.store is None or ranks.control is None:
        yield
        return
    # A copy, for the main thread may wait for an answer on its own.
    store = ranks.store.clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=patience))
    watching = HangReport(waits, store, ranks.control.rank(), ranks.world_size, patience)
    try:
        yield
    finally:
        watching.close()
