"""The ranks that serve a model together: how they talk, and which of them is blamed for an end."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..train.waits import RankState, Waits, report

T = TypeVar("T")
LOADING = timedelta(days=1)
"""How long ranks wait for one another before they serve."""
TICK = 0.3
"""Seconds between two signs of life."""


class RankFailure(RuntimeError):
    """Another rank has ended, or does not answer; the message names it."""


class Group:
    """All ranks, of which this is `rank`. Every method but `fail` is called by all of them.

    Where another does not follow within `patience` seconds, or has ended, it raises RankFailure.
    """

    def __init__(self, store: Store, rank: int, size: int, patience: float = 5.0) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self.waits = Waits()
        dist.init_process_group(
            "gloo", store=PrefixStore("ranks", store), rank=rank, world_size=size, timeout=LOADING
        )
        self._steps = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        self._life = _Life(store, rank, size, self.waits)

    @classmethod
    def of_torchrun(cls, patience: float) -> Group | None:
        """The ranks that torchrun started; None where it started one, or was not used.

        Raises ValueError where its environment is incomplete.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        try:
            store, rank, size = next(rendezvous("env://", timeout=LOADING))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"WORLD_SIZE is set, but the ranks cannot meet: {error}") from None
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"serve {start}", store), rank, size, patience)

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def meet(self) -> None:
        """Returns when all ranks are there, however long they take."""
        with self._waiting("the others to be ready"):
            dist.barrier()

    def all_to_all(self, rows: Tensor, sent: Sequence[int], arrived: Sequence[int]) -> Tensor:
        """Rows to each rank, and from each rank, in the order of ranks."""
        found = rows.new_empty(sum(arrived), *rows.shape[1:])
        wire = torch.uint8 if rows.itemsize == 1 else rows.dtype  # gloo knows nothing of FP8
        with self._waiting("rows of experts"):
            dist.all_to_all_single(
                found.view(wire), rows.contiguous().view(wire), list(arrived), list(sent),
                group=self._steps,
            )  # fmt: skip
        return found

    def all_gather(self, *numbers: int) -> list[list[int]]:
        """The numbers of each rank."""
        mine = torch.tensor(numbers)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._waiting("what ranks call next"):
            dist.all_gather(found, mine, group=self._steps)
        return [one.tolist() for one in found]

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        with self._waiting("loads of experts"):
            dist.all_reduce(counts, group=self._steps)
        return counts

    def broadcast(self, value: T | None = None) -> T:
        """The value of rank 0."""
        found: list[Any] = [value]
        with self._waiting("requests"):
            dist.broadcast_object_list(found, src=0, group=self._steps)
        return found[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, elsewhere nothing."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._waiting("answers"):
            dist.gather_object(value, found, dst=0, group=self._steps)
        return found or []

    def move(self, sent: Sequence[tuple[int, Tensor]], into: Sequence[tuple[int, Tensor]]) -> None:
        """Sends tensors to ranks and receives others; each pair of ranks has them in one order."""
        with self._waiting("weights of experts"):
            works = [dist.isend(tensor, rank, group=self._steps) for rank, tensor in sent]
            works += [dist.irecv(tensor, rank, group=self._steps) for rank, tensor in into]
            for work in works:
                assert work is not None  # this rank is in the group
                work.wait()

    def fail(self, error: BaseException) -> None:
        """Leaves a note for the others that this rank ends, and why."""
        if not isinstance(error, RankFailure):
            self._life.tell(f"rank {self.rank} on {socket.gethostname()} failed: {error}")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Reports a failure within it to the others."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def close(self) -> None:
        self._life.close()
        dist.destroy_process_group()

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            with self.waits.waiting(what, self.others):
                yield
        except RuntimeError as error:
            with self.waits.waiting(what, self.others):
                line = self._life.blame(what, time.monotonic() - start)
            # The threads of a group that has lost a rank abort the process when they are ended.
            atexit.register(os._exit, 1)
            raise RankFailure(line) from error


class _Life:
    """Signs of life that each rank leaves in the store, and what follows where they end."""

    def __init__(self, store: Store, rank: int, size: int, waits: Waits) -> None:
        self._rank, self._size, self._waits = rank, size, waits
        self._store = store
        store.set(f"host {rank}", socket.gethostname())
        # Copies, for each thread waits for the answers to its own questions.
        self._mine = store.clone()  # type: ignore[attr-defined]
        for one in (store, self._mine):
            one.set_timeout(timedelta(seconds=5))
        self._ended = Event()
        self._thread = Thread(target=self._live, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def tell(self, line: str) -> None:
        """The first word on why ranks end is what all of them say."""
        with suppress(RuntimeError):
            self._store.compare_set("why", "", line)

    def blame(self, what: str, seconds: float) -> str:
        """Why ranks end, as one of them found out: a rank without signs of life, or one that all
        others wait for."""
        try:
            if self._store.add("asked", 1) > 1 and (line := self._told(12 * TICK)):
                return line
            if line := self._told(2 * TICK):  # a rank that failed says so itself
                return line
            before = self._signs()
            time.sleep(4 * TICK)
            after = self._signs()
            states = {
                rank: RankState(**state["state"])
                for rank, state in after.items()
                if before.get(rank, state)["count"] != state["count"]
            }
            hosts = [self._store.get(f"host {rank}").decode() for rank in range(self._size)]
            states[self._rank] = RankState(hosts[self._rank], what, self._others)
            self.tell(report(self._rank, seconds, states, hosts))
            return self._told(0) or "ranks have ended"
        except RuntimeError:
            return "rank 0 or its torchrun, where ranks meet, has ended or does not answer"

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _told(self, seconds: float) -> str:
        until = time.monotonic() + seconds
        while not self._store.check(["why"]):
            if time.monotonic() >= until:
                return ""
            time.sleep(TICK / 3)
        return self._store.get("why").decode()

    def _signs(self) -> dict[int, Any]:
        return {
            rank: json.loads(self._store.get(f"life {rank}"))
            for rank in range(self._size)
            if self._store.check([f"life {rank}"])
        }

    def _live(self) -> None:
        count = 0
        with suppress(RuntimeError):  # the store has gone, as this rank will see
            while not self._ended.wait(TICK):
                count += 1
                state = {"count": count, "state": asdict(RankState.of(self._waits))}
                self._mine.set(f"life {self._rank}", json.dumps(state))


def end_now(error: RankFailure) -> None:
    """Ends this process, whose groups would wait for ranks that are no more."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)
