"""The process groups of a run, and how its ranks act and fail together.

`torchrun` sets the environment of each process. A single process has no groups, and every function
here then only does its work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.cuda import is_available
from torch.distributed import (
    ProcessGroup,
    ReduceOp,
    all_gather_object,
    all_reduce,
    broadcast_object_list,
    destroy_process_group,
    get_backend,
    group,
    init_process_group,
    new_group,
)
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .settings import TrainError

T = TypeVar("T")
TIMEOUT = timedelta(days=1)
"""How long ranks wait for the work of one, such as tokenizing text or hashing a checkpoint."""


@dataclass(frozen=True)
class ProcessGroups:
    """Three groups of all ranks of a run, and their store; None: there is one rank.

    `training` reduces gradients, on the device that trains. `control` keeps the ranks in step.
    `writing` is for checkpoints, which are written in the background.
    """

    training: ProcessGroup | None = None
    control: ProcessGroup | None = None
    writing: ProcessGroup | None = None
    store: Store | None = None
    """Where ranks leave notes for one another, also while they wait in a group."""

    @property
    def world_size(self) -> int:
        return self.control.size() if self.control else 1

    @property
    def is_rank0(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.control is None or self.control.rank() == 0


@contextmanager
def init_process_groups() -> Iterator[ProcessGroups]:
    """The groups of the run that torchrun started this process for.

    Raises TrainError where the environment is incomplete, or when another rank has failed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ProcessGroups()
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun starts ranks again with the store of before, which has their old addresses.
            # Agents count alike unless one has joined later, as spare nodes do: job files of
            # `dslc launch` ask for a new store each time.
            store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        groups = PrefixStore("groups", store)
        init_process_group("gloo", store=groups, rank=rank, world_size=size, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise TrainError(
            f"WORLD_SIZE is set, but the process groups cannot be initialized: {error}"
        ) from None
    try:
        yield ProcessGroups(
            training=new_training_group(),
            control=group.WORLD,
            writing=new_group(backend="gloo", timeout=TIMEOUT),
            store=PrefixStore("notes", store),
        )
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        # The error has no class of its own. The rank that failed says why, or torchrun does.
        raise TrainError("another rank has failed, so this one exits") from None
    finally:
        destroy_process_group()


def new_training_group(ranks: Iterable[int] | None = None) -> ProcessGroup:
    """A group, by default of all ranks, for tensors of the device that trains.

    All ranks call it, in the same order.
    """
    # The device of a tensor decides which of the two backends is used.
    backend = "cpu:gloo,cuda:nccl" if is_available() else "gloo"
    if get_backend() == "fake":  # nothing is sent
        backend = "fake"
    made: ProcessGroup = new_group(None if ranks is None else list(ranks), backend=backend)
    return made


def on_rank0(ranks: ProcessGroup | None, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and broadcasts the result; the other ranks wait.

    A TrainError or OSError that it raises there is raised on all ranks.
    """
    if ranks is None:
        return work()
    outcome: list[Any] = [_attempt(work) if ranks.rank() == 0 else None]
    broadcast_object_list(outcome, group=ranks, group_src=0)
    value: Any
    value, failure = outcome[0]
    _raise(failure)
    return value  # type: ignore[no-any-return]


def on_all_ranks(ranks: ProcessGroup | None, work: Callable[[], T]) -> T:
    """Runs `work` on each rank and waits for all; `work` itself must not wait for other ranks.

    A TrainError or OSError that any rank raises is raised on all ranks.
    """
    if ranks is None:
        return work()
    value: Any
    value, failure = _attempt(work)
    _raise(*all_gather_objects(ranks, failure))
    return value  # type: ignore[no-any-return]


def all_gather_objects(ranks: ProcessGroup | None, value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    if ranks is None:
        return [value]
    values: list[Any] = [None] * ranks.size()
    all_gather_object(values, value, group=ranks)
    return values


def all_reduce_max(ranks: ProcessGroup | None, *values: int) -> list[int]:
    """The maximum of each value over all ranks."""
    if ranks is None:
        return list(values)
    found = torch.tensor(values)
    all_reduce(found, ReduceOp.MAX, group=ranks)
    return found.tolist()


Failure = tuple[type[Exception], tuple[Any, ...]]
"""An error as its type and arguments.

An exception holds its traceback and so the frames of all callers: the groups would live until the
interpreter exits, and their threads, which cannot stop then, sometimes abort the process.
"""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Failure | None]:
    try:
        return work(), None
    except (TrainError, OSError) as error:
        return None, (type(error), error.args)


def _raise(*failures: Failure | None) -> None:
    """Raises the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            kind, arguments = failure
            raise kind(*arguments)
