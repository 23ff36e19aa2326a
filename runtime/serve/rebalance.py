"""Loads of experts while a model is served, and their places by them: a layer between two steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from ..eplb import Placement, imbalance
from ..files import replace_text
from .group import Group
from .spread import Balancing, Layer

WORTH = Fraction(21, 20)
"""By so much the busiest rank must be less busy, or weights are not moved for it."""
PARTS = 1024
"""Of a token, in which loads are averaged: whole numbers, so that all ranks compute the same."""
SELDOM = 1000
"""Steps after which loads are taken where experts are not placed by them."""
PAST = 8
"""The newest loads are one part of so many of the average."""


class Rebalance:
    """The loads of all layers as moving averages, and what follows from them.

    All ranks take the same steps: they sum their loads, compute the same placements, and move the
    weights of one layer after each step. In between, the model is whole.
    """

    def __init__(
        self, model: str, layers: Sequence[Layer], group: Group | None, balancing: Balancing
    ) -> None:
        self.model, self.layers, self.group, self.balancing = model, layers, group, balancing
        self.loads: dict[str, list[int]] = {}
        self.moved = 0
        """Layers whose experts were moved."""
        self._waiting: list[tuple[Layer, Placement]] = []
        self._steps = self._since = 0

    def due(self, idle: bool) -> bool:
        """On rank 0, before a step: whether all take their loads after it."""
        counted = any(int(layer.load.sum()) for layer in self.layers)
        return self._since + 1 >= (self.balancing.every or SELDOM) or (idle and counted)

    def imbalances(self) -> dict[str, float]:
        """By layer the load of the busiest rank over the mean of all, as far as loads are known."""
        return {
            layer.name: float(imbalance(self.loads[layer.name], layer.placement))
            for layer in self.layers
            if layer.name in self.loads
        }

    def step(self, take_loads: bool) -> None:
        """After a step of all ranks."""
        self._steps += 1
        self._since += 1
        if self._waiting:
            layer, placement = self._waiting.pop(0)
            layer.move(placement)
            self.moved += 1
        if take_loads:
            self._since = 0
            self._take_loads()

    def _take_loads(self) -> None:
        new = torch.cat([layer.take_load() for layer in self.layers])
        if self.group is not None:
            self.group.sum(new)
        if not int(new.sum()):
            return
        sizes = [layer.stack.total for layer in self.layers]
        for layer, counts in zip(self.layers, new.split(sizes), strict=True):
            before = self.loads.get(layer.name)
            scaled = [count * PARTS for count in counts.tolist()]
            self.loads[layer.name] = scaled if before is None else _average(before, scaled)
        if self.balancing.every and not self._waiting:
            self._plan()
        if self.balancing.record is not None and (self.group is None or self.group.rank == 0):
            write_loads(self.balancing.record, self.model, self._steps, self.loads)

    def _plan(self) -> None:
        for layer in self.layers:
            load = self.loads[layer.name]
            placement = self.balancing.place(load, layer.ranks)
            if imbalance(load, layer.placement) > WORTH * imbalance(load, placement):
                self._waiting.append((layer, placement))


def _average(before: Sequence[int], new: Sequence[int]) -> list[int]:
    return [old + (count - old) // PAST for old, count in zip(before, new, strict=True)]


def write_loads(path: Path, model: str, steps: int, loads: Mapping[str, Sequence[int]]) -> None:
    """What `dslc plan --serve TRAFFIC --load FILE` reads, whole or not at all. Raises OSError."""
    values = {"model": model, "steps": steps, "load": loads}
    replace_text(path, json.dumps(values) + "\n")


def read_loads(path: Path) -> dict[str, list[int]]:
    """Loads by the name of a block. Raises ValueError for a file that has none."""
    try:
        loads = json.loads(path.read_text(encoding="utf-8"))["load"]
        found = {str(name): [int(count) for count in load] for name, load in loads.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no load file of --record-load: {error}") from None
    if any(count < 0 for load in found.values() for count in load):
        raise ValueError(f"{path} has a load below 0")
    return found
