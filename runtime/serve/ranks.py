"""One rank of a served model: what torchrun started this process for."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint
from ..model import LanguageModel
from ..train.device import select_device
from .engine import Engine
from .front import Front, RankEngine, follow
from .grammar import Grammars
from .group import Group, RankFailure, end_now
from .lockstep import Lockstep
from .options import Options
from .rebalance import Rebalance, read_loads
from .spread import Balancing, spread


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether another process is the server."""
    return world_size() > 1 and os.environ.get("RANK") != "0"


def local_ranks() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Parallel:
    """How experts are spread, and how long ranks wait for one another."""

    balancing: Balancing
    loads: Path | None = None
    """A file by which they are placed at first."""
    patience: float = 5.0


@dataclass(frozen=True)
class Served:
    """What every rank needs to make its engine."""

    model: type[LanguageModel]
    folder: Path
    device: str | None
    options: Options
    threads: int
    free_memory: Callable[[torch.device], int]
    grammars: Callable[[], Grammars]
    parallel: Parallel


def make_rank(served: Served) -> RankEngine:
    """Returns when all ranks are ready. Raises ValueError for what cannot be served, LoadError for
    weights that do not fit, RankFailure where another rank has failed."""
    torch.set_num_threads(served.threads)
    group = Group.of_torchrun(served.parallel.patience)
    with group.telling() if group is not None else nullcontext():
        return _make(served, group)


def _make(served: Served, group: Group | None) -> RankEngine:
    parallel, options = served.parallel, served.options
    device = select_device(served.device)
    if device.type != "cpu":
        raise ValueError("experts on several ranks are served on CPUs: give --device cpu")
    loads = None if parallel.loads is None else read_loads(parallel.loads)
    balancing = dataclasses.replace(
        parallel.balancing,
        nodes=max(world_size() // local_ranks(), 1),
        groups=getattr(served.model.config.params, "n_group", 1),
    )
    loaded = served.model(device="meta")
    layers = spread(loaded, group, balancing, loads)
    checkpoint.load(loaded, served.folder, whole=served.model(device="meta"))
    if options.cache_bytes is None:
        free = served.free_memory(device) // local_ranks()
        if group is not None:  # a request fits on all ranks or on none
            free = min(one for (one,) in group.all_gather(free))
        options = dataclasses.replace(options, cache_bytes=free)
    together = Lockstep(loaded, layers, group, options.page)
    together.warm_up()
    engine = Engine(together, options, served.grammars())
    rebalance = Rebalance(served.model.config.model, layers, group, balancing)
    return RankEngine(engine, together, group, rebalance)


def make_front(served: Served) -> Front:
    """Rank 0, in the process of the engine."""
    return Front(make_rank(served))


def run_follower(served: Served) -> None:
    """Another rank: returns when rank 0 ends; where one fails, the process ends with status 1."""
    try:
        rank = make_rank(served)
        assert rank.group is not None
        leave_signals_to_server()
        with rank.group.telling():
            follow(rank)
        rank.group.close()
    except RankFailure as error:
        end_now(error)


def leave_signals_to_server() -> None:
    """A signal to all ranks is for the server, which lets requests end first. Before ranks are
    ready it ends each of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
