"""Which processes train together, and how they come to agree.

`torchrun` tells each process in the environment. One process has no groups, and whatever is asked
for here is then done at once by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
    group,
    init_process_group,
    new_group,
)

from .settings import TrainError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long ranks wait for what one does alone: makes tokens of text, or hashes a checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run, three times; None: there is one.

    `training` is for gradients, on the device that trains. `agreeing` is for what the ranks have to
    do alike. `writing` is for checkpoints, which are written while training goes on.
    """

    training: ProcessGroup | None = None
    agreeing: ProcessGroup | None = None
    writing: ProcessGroup | None = None

    @property
    def count(self) -> int:
        return self.agreeing.size() if self.agreeing else 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.agreeing is None or self.agreeing.rank() == 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the run that torchrun started this process for.

    Raises TrainError where it is not told which it is, and when another rank has ended too early.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    try:
        init_process_group("gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise TrainError(f"WORLD_SIZE is set, but the ranks do not meet: {error}") from None
    try:
        yield Ranks(
            # Of these, the device of a tensor decides.
            training=new_group(backend="cpu:gloo,cuda:nccl" if is_available() else "gloo"),
            agreeing=group.WORLD,
            writing=new_group(backend="gloo", timeout=PATIENCE),
        )
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        # It has no class of its own. The rank that ended says why, or torchrun does.
        raise TrainError("another rank has ended, and so does this one") from None
    finally:
        destroy_process_group()


def by_first(ranks: ProcessGroup | None, work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, for all; the others wait.

    What it raises there as TrainError or OSError is raised on all.
    """
    if ranks is None:
        return work()
    outcome: list[Any] = [_attempt(work) if ranks.rank() == 0 else None]
    broadcast_object_list(outcome, group=ranks, group_src=0)
    value: Any
    value, failure = outcome[0]
    _raise(failure)
    return value  # type: ignore[no-any-return]


def by_all(ranks: ProcessGroup | None, work: Callable[[], T]) -> T:
    """What `work` gives on each rank, after it was done on all; it must not wait for others.

    What any rank raises as TrainError or OSError is raised on all, the same.
    """
    if ranks is None:
        return work()
    value: Any
    value, failure = _attempt(work)
    _raise(*gathered(ranks, failure))
    return value  # type: ignore[no-any-return]


def gathered(ranks: ProcessGroup | None, value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if ranks is None:
        return [value]
    values: list[Any] = [None] * ranks.size()
    all_gather_object(values, value, group=ranks)
    return values


def largest(ranks: ProcessGroup | None, *values: int) -> list[int]:
    """Of each value the largest of all ranks."""
    if ranks is None:
        return list(values)
    found = torch.tensor(values)
    all_reduce(found, ReduceOp.MAX, group=ranks)
    return found.tolist()


Failure = tuple[type[Exception], tuple[Any, ...]]
"""An error as its type and arguments.

An error itself holds its traceback, and so the frames of all functions above: the groups would live
until Python ends, and their threads, which cannot end then, abort the process now and again.
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
