"""What `dslc calibrate` measures on the ranks of a cluster, or on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup

from . import measure
from .measure import Clock, Work
from .ranks import ProcessGroups, all_reduce_max, new_training_group

SMALLEST = 1 << 12
"""Bytes of the smallest message that is measured."""


class Figures(Protocol):
    """What of a plan is measured (`compiler/plan/measurable.py`); sizes in bytes."""

    @property
    def products(self) -> Sequence[Any]: ...
    @property
    def attention(self) -> Any: ...
    @property
    def pointwise(self) -> int: ...
    @property
    def dispatch(self) -> int: ...
    @property
    def combine(self) -> int: ...
    @property
    def pair(self) -> int: ...
    @property
    def ring(self) -> int: ...


@dataclass(frozen=True)
class Measurements:
    """Seconds and rates. Links have bytes a second that leave a rank, and seconds besides."""

    products: Sequence[tuple[Any, float]]
    attention: tuple[float, float] | None
    memory_bandwidth: float
    launch: float
    links: Mapping[str, tuple[float, float]]


def calibrate(
    figures: Figures,
    expert: int,
    limit: int,
    ranks: ProcessGroups,
    device: torch.device,
    budget: float,
    said: Callable[[str], None],
) -> Measurements:
    """All ranks call it. Products are those of the first rank; messages are between all.

    `expert` are the ranks of an expert group, `limit` is the largest message in bytes, `budget`
    about how many seconds each figure may take. `said` is called with what comes next.
    """
    clock = Clock(device, budget)
    said(f"{len(figures.products)} products")
    products = [(one, _product(one, clock)) for one in figures.products]
    said("attention and memory")
    attention = None if figures.attention is None else _attention(figures.attention, clock)
    work, size = measure.addition(max(figures.pointwise, SMALLEST), device)
    bandwidth = size / clock.seconds(work)
    launch = clock.seconds(measure.addition(1, device)[0])
    links: dict[str, tuple[float, float]] = {}
    if ranks.training is not None:
        said("messages")
        links = _links(figures, expert, limit, ranks, clock)
    return Measurements(products, attention, bandwidth, launch, links)


def _product(one: Any, clock: Clock) -> float:
    return clock.seconds(
        measure.product(one.dtype, one.m, one.n, one.k, one.groups, one.weight_grad, clock.device)
    )


def _attention(one: Any, clock: Clock) -> tuple[float, float]:
    """FLOP/s of the half of the scores that are needed, forward and backward."""
    works = measure.attention(
        one.dtype, one.batch, one.seq, one.heads, one.qk, one.v, one.kv_heads, clock.device
    )
    pairs = one.batch * one.heads * (one.seq * one.seq // 2)
    flops = 2 * pairs * (one.qk + one.v), 2 * pairs * (3 * one.qk + 2 * one.v)
    forward, backward = (
        count / clock.seconds(work) for count, work in zip(flops, works, strict=True)
    )
    return forward, backward


def _links(
    figures: Figures, expert: int, limit: int, ranks: ProcessGroups, clock: Clock
) -> dict[str, tuple[float, float]]:
    world = ranks.training
    assert world is not None and ranks.control is not None
    found = {}
    group = _expert_group(expert, world)
    if group is not None and group.size() > 1:
        for name in ("dispatch", "combine"):
            found[name] = _line(
                lambda size: measure.all_to_all(size, group, clock.device),
                min(limit, getattr(figures, name)), ranks.control, clock,
            )  # fmt: skip
    peer = world.rank() ^ 1
    if figures.pair and world.size() % 2 == 0:
        found["pair"] = _line(
            lambda size: measure.exchange_with(peer, size, clock.device),
            min(limit, figures.pair), ranks.control, clock,
        )  # fmt: skip
    found["ring"] = _line(
        lambda size: measure.reduce_scatter(size, world, clock.device),
        min(limit, figures.ring), ranks.control, clock,
    )  # fmt: skip
    return {name: found[name] for name in ("dispatch", "combine", "pair", "ring") if name in found}


def _expert_group(expert: int, world: ProcessGroup) -> ProcessGroup | None:
    """This rank's of groups as wide as the plan's, or as there are ranks."""
    width = min(expert, world.size())
    if width < 2 or world.size() % width:
        return None
    firsts = range(0, world.size(), width)
    return [new_training_group(range(first, first + width)) for first in firsts][
        world.rank() // width
    ]


def _line(
    work: Callable[[int], Work], most: int, control: ProcessGroup, clock: Clock
) -> tuple[float, float]:
    """Of messages of three sizes up to `most` bytes, as the slowest rank sees them."""
    sizes = sorted({max(SMALLEST, most // part) for part in (16, 4, 1)})
    points = []
    for size in sizes:
        seconds = clock.seconds(work(size), control)
        (slowest,) = all_reduce_max(control, round(seconds * 1e9))
        points.append((size, slowest / 1e9))
    return measure.line(points)
