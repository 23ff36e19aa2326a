"""How evenly redundant experts spread a recorded load over the GPUs of a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsl.schema.traffic import Traffic, Unit
from runtime.eplb import imbalance, place

COUNTS = (0, 32, 64)
"""Redundant experts that are compared, besides those of the traffic file."""


@dataclass(frozen=True)
class Evenness:
    """Tokens of the busiest GPU over the mean of all: 1 is perfect."""

    mean: float
    """Of all layers."""
    worst: float


@dataclass(frozen=True)
class LoadBalance:
    """Of one number of redundant experts in every layer."""

    redundant: int
    decode: Evenness | None
    """None: there are not enough experts for all GPUs."""
    prefill: Evenness | None


def balances(
    loads: Iterable[Sequence[int]], traffic: Traffic, gpus_per_node: int, groups: int
) -> list[LoadBalance]:
    """Expected for the placement by each layer's own load, for 0, 32 and 64 redundant experts."""
    layers = list(loads)
    counts = sorted({*COUNTS, traffic.decode.redundant, traffic.prefill.redundant})

    def evenness(unit: Unit, redundant: int) -> Evenness | None:
        if any(len(load) + redundant < unit.expert for load in layers):
            return None
        nodes = -(-unit.expert // gpus_per_node)
        found = [
            imbalance(load, place(load, redundant, unit.expert, nodes, groups)) for load in layers
        ]
        return Evenness(float(sum(found) / len(found)), float(max(found)))

    return [
        LoadBalance(n, evenness(traffic.decode, n), evenness(traffic.prefill, n)) for n in counts
    ]
