"""Which counts of micro-batches the steps of a training have whose batch changes on the way.

A batch is dealt evenly to data ranks in whole micro-batches, with DualPipe half of them from each
end. While it grows its steps are stairs: of all counts on the way at most `MOST` have a schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compiler.parallel.layout import placement
from dsl.schema import Parallel, Schedule

MOST = 16
"""Counts for one phase: a schedule of DeepSeek-V3's has 200 kB, and is made in 30 ms."""


def longest(pipeline: int) -> int:
    """Micro-batches of the longest schedule: its bubble is an eighth at most."""
    return max(256, 8 * pipeline)


def rounds(count: int, directions: int, longest: int) -> list[int]:
    """How `count` micro-batches are executed: schedules one after the other, of even lengths.

    The runtime has the same rule (`runtime/train/pipeline.py`).
    """
    parts = -(-count // longest)
    each, more = divmod(count // directions, parts)
    return [(each + (i < more)) * directions for i in range(parts)]


@dataclass(frozen=True)
class BatchSizes:
    """What a batch is cut into: micro-batches of `micro_batch` sequences on each of `data` ranks,
    in numbers that `directions` divide."""

    data: int
    micro_batch: int
    directions: int

    @classmethod
    def of(cls, parallel: Parallel, data: int, micro_batch: int | None = None) -> BatchSizes:
        """On `data` ranks a stage; `micro_batch` is that of training, by default the plan's."""
        ways = len(placement(parallel.schedule, parallel.pipeline))
        return cls(data, micro_batch or parallel.micro_batch, ways)

    @property
    def least(self) -> int:
        """Sequences of the smallest batch; all others are multiples."""
        return self.data * self.micro_batch * self.directions


def uneven(batch: Schedule, sizes: BatchSizes) -> list[float]:
    """The ends of phases that cannot be dealt; nothing where all steps can."""
    ends = (end for phase in batch.root for end in (phase.start, phase.value) if end is not None)
    return [end for end in dict.fromkeys(ends) if end <= 0 or end % sizes.least]


def micro_batches(batch: Schedule, sizes: BatchSizes) -> tuple[int, ...]:
    """The counts of micro-batches of all steps, ascending; `uneven` has found nothing."""
    found: set[int] = set()
    for phase in batch.root:
        last = round(phase.value) // sizes.least
        first = last if phase.start is None else round(phase.start) // sizes.least
        low, high = min(first, last), max(first, last)
        stride = max(1, math.ceil((high - low) / (MOST - 1)))
        found |= {*range(low, high, stride), high}
    return tuple(sorted(n * sizes.directions for n in found))
