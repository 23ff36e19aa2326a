"""What `dslc doctor` checks of the ranks of a cluster before a run, and which of them it names."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from . import measure
from .measure import Clock
from .memory import memory_of
from .ranks import ProcessGroups, all_gather_objects
from .settings import TrainError

CPU_SIZE, GPU_SIZE = 1024, 8192
"""Rows, columns and depth of the standard product: float32 on a CPU, bfloat16 on a GPU."""


@dataclass(frozen=True)
class Checks:
    """What is checked, and how thoroughly."""

    slow: float = 0.8
    """Less than this share of the median rate of all ranks is named."""
    seconds: float = 1.0
    """About how long each figure is measured."""
    message: int = 1 << 26
    """Bytes of a message between two ranks."""
    written: int = 1 << 28
    """Bytes that each rank writes to `folder`."""
    folder: Path | None = None
    needed: int | None = None
    """Bytes of memory that a rank of the plan needs."""
    ranks: int | None = None
    """Ranks of the plan."""


@dataclass
class RankReport:
    """What a rank found; rates in FLOP/s and bytes a second. None: not measured."""

    rank: int
    host: str
    versions: Mapping[str, str]
    memory: int | None
    product: float = 0.0
    pairs: Mapping[int, float] = field(default_factory=dict)
    """By the rank at the other end."""
    disk: float | None = None
    failure: str = ""

    @property
    def pair(self) -> float | None:
        """The median, which one slow neighbour does not change."""
        return median(self.pairs.values()) if self.pairs else None


def examine(
    checks: Checks, ranks: ProcessGroups, device: torch.device, said: Callable[[str], None]
) -> list[RankReport]:
    """The reports of all ranks; all call it. `said` is called with what comes next."""
    control = ranks.control
    rank = control.rank() if control is not None else 0
    mine = RankReport(rank, socket.gethostname(), versions(device), memory_of(device))
    clock = Clock(device, checks.seconds)
    said("a standard product on each rank")
    dtype, size = ("bf16", GPU_SIZE) if device.type == "cuda" else ("fp32", CPU_SIZE)
    work = measure.product(dtype, size, size, size, 1, False, device)
    mine.product = 2 * size**3 / clock.seconds(work, control)
    if control is not None:
        said("messages between pairs of ranks")
        mine.pairs = _pairs(rank, checks.message, ranks, clock)
    if checks.folder is not None:
        said(f"writing to {checks.folder}")
        try:
            mine.disk = _written(checks.folder, checks.written)
        except OSError as error:
            mine.failure = f"cannot write to {checks.folder}: {error.strerror or error}"
    return all_gather_objects(control, mine)


def versions(device: torch.device) -> dict[str, str]:
    """What has to be the same on all ranks."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _pairs(rank: int, size: int, ranks: ProcessGroups, clock: Clock) -> dict[int, float]:
    """Bytes a second to and from one rank at each distance of 1, 2, 4, .., all pairs at once."""
    world, found = ranks.world_size, {}
    distance = 1
    while distance < world:
        peer = rank ^ distance
        # Who has no peer sends to itself, so that all repeat as often.
        work = (
            measure.exchange_with(peer, size, clock.device)
            if peer < world
            else measure.addition(1, clock.device)[0]
        )
        seconds = clock.seconds(work, ranks.control)
        if peer < world:
            found[peer] = size / seconds
        distance *= 2
    return found


def _written(folder: Path, size: int) -> float:
    """Bytes a second that one file takes, until they are on the disk."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(max(1, size >> 20)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return max(1, size >> 20) * len(block) / (time.perf_counter() - start)


def problems(reports: Sequence[RankReport], checks: Checks) -> Iterator[str]:
    """One line for each problem, with the rank and its host."""
    if checks.ranks is not None and checks.ranks != len(reports):
        yield f"the plan is for {checks.ranks:,} ranks, and {len(reports):,} were started"
    yield from _different(reports)
    counts = Counter(one.host for one in reports)
    usual = Counter(counts.values()).most_common(1)[0][0]
    for host, count in counts.items():
        if count != usual:
            yield f"{host} has {count} ranks, others have {usual}"
    for one in reports:
        if one.failure:
            yield f"{_named(one)}: {one.failure}"
        if checks.needed is not None and one.memory is not None:
            share = one.memory / (1 if one.versions["device"] != "CPU" else counts[one.host])
            if share < checks.needed:
                yield (
                    f"{_named(one)}: {share / 1e9:.1f} GB of memory, and the plan needs "
                    f"{checks.needed / 1e9:.1f} GB"
                )
    rates: Mapping[str, Callable[[RankReport], float | None]] = {
        "standard product": lambda one: one.product,
        "messages": lambda one: one.pair,
        "disk": lambda one: one.disk,
    }
    for name, rate in rates.items():
        yield from _slow(name, {one.rank: rate(one) for one in reports}, reports, checks.slow)


def _slow(
    name: str, rates: Mapping[int, float | None], reports: Sequence[RankReport], share: float
) -> Iterator[str]:
    known = {rank: rate for rank, rate in rates.items() if rate is not None}
    if len(known) < 2:
        return
    usual = median(sorted(known.values())[-(-len(known) // 2) :])
    for one in reports:
        if one.rank in known and known[one.rank] < share * usual:
            part = known[one.rank] / usual
            yield f"{_named(one)} is slow: {name} at {part:.0%} of what fast ranks reach"


def _different(reports: Sequence[RankReport]) -> Iterator[str]:
    for name in reports[0].versions:
        counts = Counter(one.versions.get(name, "none") for one in reports)
        usual = counts.most_common(1)[0][0]
        for one in reports:
            found = one.versions.get(name, "none")
            if found != usual:
                yield f"{_named(one)}: {name} {found}, others have {usual}"


def _named(one: RankReport) -> str:
    return f"rank {one.rank} on {one.host}"


def require_folder(folder: Path) -> Path:
    """Raises TrainError where there is no such folder."""
    if not folder.is_dir():
        raise TrainError(f"{folder} is not a folder")
    return folder
