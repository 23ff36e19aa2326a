"""How long things take here: products, attention, memory, messages and collectives.

For `calibrate.py` and `doctor.py`. What is measured is what a built package calls on this device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    all_to_all_single,
    barrier,
    irecv,
    isend,
    reduce_scatter_single,
)

from .. import fp8, functional, gradients
from .ranks import all_reduce_max

Work = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST = 100
"""Repetitions at most."""


@dataclass(frozen=True)
class Clock:
    """Times work on a device for about `budget` seconds, and at least once after a warm-up."""

    device: torch.device
    budget: float

    def seconds(self, work: Work, group: ProcessGroup | None = None) -> float:
        """The median. With a `group` all its ranks call it, and repeat it equally often."""
        first = self._once(work)
        count = max(1, min(MOST, int(self.budget / max(first, 1e-6))))
        (count,) = all_reduce_max(group, count)
        times = []
        for _ in range(count):
            if group is not None:
                barrier(group)
            times.append(self._once(work))
        return median(times)

    def _once(self, work: Work) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def product(
    dtype: str, m: int, n: int, k: int, groups: int, weight_grad: bool, device: torch.device
) -> Work:
    """[m, k] x [k, n]; of `groups` experts their rows together, m, or k of gradients of weights."""
    if dtype == "fp8":
        return _fp8_product(m, n, k, groups, weight_grad, device)
    make = partial(torch.randn, dtype=DTYPES[dtype], device=device)
    if weight_grad:
        dy, x = make(k, m), make(k, n)
        if groups > 1:
            return partial(gradients.grouped_linear_weight_grad, dy, x, _ends(k, groups, device))
        return partial(gradients.linear_weight_grad, dy, x)
    if groups > 1:
        x, w = make(m, k), make(groups, n, k)
        return partial(functional.grouped_linear, x, _ends(m, groups, device), w)
    return partial(functional.linear, make(m, k), make(n, k))


def _fp8_product(
    m: int, n: int, k: int, groups: int, weight_grad: bool, device: torch.device
) -> Work:
    make = partial(torch.randn, device=device)
    if weight_grad:
        offs = (_ends(k, groups, device),) if groups > 1 else ()
        rows = [fp8.quantize_columns(make(k, size), *offs) for size in (m, n)]
        call = fp8.grouped_linear_weight_grad if groups > 1 else fp8.linear_weight_grad
        return partial(call, *rows[0], *rows[1], *offs, dtype=torch.bfloat16)
    x = fp8.quantize(make(m, k))
    if groups > 1:
        w = fp8.quantize_weight(make(groups, n, k))
        ends = _ends(m, groups, device)
        return partial(fp8.grouped_linear, *x, ends, *w, dtype=torch.bfloat16)
    return partial(fp8.linear, *x, *fp8.quantize_weight(make(n, k)), dtype=torch.bfloat16)


def _ends(rows: int, groups: int, device: torch.device) -> Tensor:
    """Where the rows of each expert end, as many for each."""
    ends = [rows * (i + 1) // groups for i in range(groups)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def attention(
    dtype: str, batch: int, seq: int, heads: int, qk: int, v: int, kv_heads: int,
    device: torch.device,
) -> tuple[Work, Work]:  # fmt: skip
    """Causal attention, and its gradients."""
    make = partial(torch.randn, dtype=DTYPES[dtype], device=device)
    q, k = make(batch, seq, heads, qk), make(batch, seq, kv_heads, qk)
    values, scale = make(batch, seq, kv_heads, v), qk**-0.5
    o, lse = gradients.attention_saving(q, k, values, scale)
    forward = partial(gradients.attention_saving, q, k, values, scale)
    backward = partial(gradients.attention_grad, torch.randn_like(o), q, k, values, o, lse, scale)
    return forward, backward


def addition(size: int, device: torch.device) -> tuple[Work, int]:
    """A sum of two tensors that reads and writes `size` bytes together; and those bytes."""
    count = max(1, size // 12)
    x, y = torch.randn(2, count, device=device)
    out = torch.empty_like(x)
    return partial(torch.add, x, y, out=out), 12 * count


def all_to_all(size: int, group: ProcessGroup, device: torch.device) -> Work:
    """In equal parts, of which `size` bytes together leave this rank."""
    ranks = group.size()
    each = max(1, size // max(1, ranks - 1))
    sent = torch.zeros(each * ranks, dtype=torch.uint8, device=device)
    return partial(all_to_all_single, torch.empty_like(sent), sent, group=group)


def reduce_scatter(size: int, group: ProcessGroup, device: torch.device) -> Work:
    """Of float32, by which a ring would send `size` bytes from each rank."""
    ranks = group.size()
    each = max(1, size // (4 * max(1, ranks - 1)))
    sums = torch.zeros(each * ranks, device=device)
    return partial(reduce_scatter_single, sums.new_empty(each), sums, group=group)


def exchange_with(peer: int, size: int, device: torch.device) -> Work:
    """`size` bytes to the rank `peer` of all ranks and as many from it, at once."""
    sent = torch.zeros(size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def work() -> None:
        requests: Sequence[Any] = isend(sent, peer), irecv(received, peer)
        for request in requests:
            request.wait()

    return work


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Bytes a second, and seconds besides, of sizes and their seconds: the largest of the sizes
    gives the rate, once the latency is taken off that the smallest one has."""
    small, large = min(points), max(points)
    rate = (large[0] - small[0]) / max(large[1] - small[1], 1e-9)
    if large[0] == small[0] or large[1] <= small[1]:
        return large[0] / max(large[1], 1e-9), 0.0
    return rate, max(0.0, small[1] - small[0] / rate)
