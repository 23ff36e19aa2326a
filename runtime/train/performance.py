"""How fast a step was, what it took, and a trace of steps."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..config import Config
from .ranks import ProcessGroups, all_reduce_max


@dataclass(frozen=True)
class Performance:
    """Of one step, over all ranks."""

    tokens_per_second: float
    """Of all ranks together."""
    flops_per_second: float
    """Of a rank, by what the model takes: without recomputation, and with experts in balance."""
    mfu: float | None
    """The time that these take at the peak rates of the cluster file (each product's in its
    element type), over the time of the step. None where the file has no rates."""
    memory_bytes: int
    """The most that any rank had until now: allocated on its GPU, or resident without one."""
    waited_least: float
    waited_most: float
    """Seconds that a rank waited in messages and sums: all that the fastest sends take, and with
    it what it is ahead of others, by rank. Of a GPU only what its host waited for."""


def measure(
    parallel: Config,
    ranks: ProcessGroups,
    device: torch.device,
    tokens: int,
    seconds: float,
    waited: float,
) -> Performance:
    """All ranks call it after a step of `tokens` that took so long, and in which they waited."""
    microseconds = round(waited * 1e6)
    memory, most, least = all_reduce_max(
        ranks.control, peak_memory(device), microseconds, -microseconds
    )
    rate = tokens / seconds
    of_rank = rate / ranks.world_size
    peak = parallel.peak_seconds_of_token
    return Performance(
        tokens_per_second=round(rate, 1),
        flops_per_second=round(parallel.flops_of_token * of_rank),
        mfu=None if peak is None else round(peak * of_rank, 6),
        memory_bytes=memory,
        waited_least=-least / 1e6,
        waited_most=most / 1e6,
    )


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def profiled(steps: int | None, trace: Path) -> Iterator[Callable[[], None]]:
    """Writes a trace for Perfetto or chrome://tracing of so many steps after the first.

    Yields what has to be called after each step.
    """
    if steps is None:
        yield lambda: None
        return

    def write(one: profile) -> None:
        trace.parent.mkdir(exist_ok=True)
        one.export_chrome_trace(str(trace))

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    order = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=order, on_trace_ready=write) as profiler:
        yield profiler.step
