"""Routed experts on several ranks: each holds some, and copies of those with most load.

A row goes to one rank for each choice of its token, and what comes of it goes back: products do not
depend on the rows beside them, and the sum over choices is made at the token's own rank, in their
order. So bits depend neither on the number of ranks nor on which copy computed a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..eplb import Placement, place
from ..model import LanguageModel
from ..routing import routed
from ..weights import Stack, Tensors
from .group import Group

METHODS = re.compile(r"forward|prefill|decode|draft(_\d+)?")
"""What generated code calls of a block: the method of the first program with an equal graph."""


@dataclass(frozen=True)
class Balancing:
    """How experts are placed."""

    redundant: int = 0
    """Copies of experts in every layer, besides one of each."""
    every: int = 0
    """Steps after which they are placed by their loads; 0: they stay where they are."""
    nodes: int = 1
    groups: int = 1
    """Of the router."""
    record: Path | None = None
    """Where rank 0 writes the loads."""

    def place(self, load: Sequence[int], ranks: int) -> Placement:
        return place(load, self.redundant, ranks, self.nodes, self.groups)


class Layer:
    """The experts of one block, of which this rank holds as many as every other."""

    def __init__(self, name: str, stack: Stack, group: Group | None) -> None:
        self.name, self.stack, self.group = name, stack, group
        self.rank, self.ranks = (0, 1) if group is None else (group.rank, group.size)
        self.load = torch.zeros(stack.total, dtype=torch.int64)
        """Tokens of this rank that chose each expert, since they were last taken."""
        self.counting = True
        self.sent = self.given_back = 0

    def hold(self, placement: Placement) -> None:
        """Gives every rank its experts; weights are the caller's."""
        self.placement = placement
        self.each = len(placement[0])
        self.stack.ids = tuple(placement[self.rank])
        slots: list[list[int]] = [[] for _ in range(self.stack.total)]
        for slot, expert in enumerate(expert for rank in placement for expert in rank):
            slots[expert].append(slot)
        self.copies = torch.tensor([len(found) for found in slots])
        most = int(self.copies.max())
        self.slots = torch.tensor([(found * most)[:most] for found in slots])
        """int64 [experts, copies]: the slots of each expert, counted over all ranks."""

    def send(self, rows: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """See `routing.Routing`."""
        self.sent += 1
        every = index.flatten()
        (places,) = (every < self.stack.total).nonzero(as_tuple=True)  # others give back tokens
        chosen, token = every[places], places // index.shape[-1]
        if self.counting:
            self.load += torch.bincount(chosen, minlength=self.stack.total)
        slot = self.slots[chosen, (token + self.rank) % self.copies[chosen]]
        order = slot.argsort(stable=True)
        sent = torch.bincount(slot, minlength=self.ranks * self.each)
        arrived = sent if self.group is None else self._exchange(sent, [self.each] * self.ranks)
        arrived = arrived.view(self.ranks, self.each)
        self._sent = sent.view(self.ranks, self.each).sum(1).tolist()
        self._arrived = arrived.sum(1).tolist()
        # Rows came rank by rank, those of each sorted by slot; products want them slot by slot.
        here = torch.arange(self.each).repeat(self.ranks).repeat_interleave(arrived.flatten())
        self._order = here.argsort(stable=True)
        found = []
        for row in rows:
            given = row.flatten(0, -2)[token[order]]
            found.append(self._exchange(given, self._sent, self._arrived)[self._order])
        return found, arrived.sum(0).cumsum(0).to(torch.int32), places[order]

    def give_back(self, y: Tensor) -> Tensor:
        """See `routing.Routing`."""
        self.given_back += 1
        back = torch.empty_like(y)
        back[self._order] = y
        return self._exchange(back, self._arrived, self._sent)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it all experts of this rank serve for any, without the others."""
        names = ("group", "rank", "ranks", "slots", "copies", "counting")
        before = [getattr(self, name) for name in names]
        self.group, self.rank, self.ranks, self.counting = None, 0, 1, False
        self.slots = (torch.arange(self.stack.total) % self.each).unsqueeze(1)
        self.copies = torch.ones_like(self.copies)
        try:
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(self, name, value)

    def move(self, placement: Placement) -> None:
        """Gives every rank its experts and their weights; all ranks call it between two steps."""
        kept = [_stay(*ranks) for ranks in zip(self.placement, placement, strict=True)]
        before = [expert for rank in self.placement for expert in rank]
        sent: list[tuple[int, Tensor]] = []
        into: list[tuple[int, Tensor]] = []
        arrived: list[tuple[Tensor, Tensor]] = []
        for slot, expert in enumerate(expert for rank in kept for expert in rank):
            if before[slot] == expert:
                continue
            to, place = divmod(slot, self.each)
            holders = [one for one, held in enumerate(before) if held == expert]
            # A copy at home, or one of several elsewhere.
            at_home = (one for one in holders if one // self.each == to)
            source = next(at_home, holders[slot % len(holders)])
            rank, other = divmod(source, self.each)
            for tensor in self._tensors():
                if rank == to == self.rank:
                    arrived.append((tensor[place], tensor[other].clone()))
                elif rank == self.rank:
                    sent.append((to, _wire(tensor[other])))
                elif to == self.rank:
                    arrived.append((tensor[place], torch.empty_like(tensor[place])))
                    into.append((rank, _wire(arrived[-1][1])))
        if self.group is not None:
            self.group.move(sent, into)
        for weight, values in arrived:
            weight.copy_(values)
        self.hold(kept)

    def _tensors(self) -> Iterator[Tensor]:
        """The weights of all experts here, as their first dimension counts them."""
        for module in self.stack.modules():
            if isinstance(module, Tensors):
                yield from (getattr(module, name).detach() for name in module.declarations)

    def take_load(self) -> Tensor:
        """Tokens that chose each expert since the last time, int64 [experts]."""
        load, self.load = self.load, torch.zeros_like(self.load)
        return load

    def _exchange(
        self, rows: Tensor, sent: Sequence[int], arrived: Sequence[int] | None = None
    ) -> Tensor:
        if self.group is None:
            return rows
        return self.group.all_to_all(rows, sent, sent if arrived is None else arrived)


def _stay(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The experts that a rank gets, in an order in which those that it has keep their slots."""
    new = list(after)
    kept: list[int | None] = []
    for expert in before:
        kept.append(expert if expert in new else None)
        if expert in new:
            new.remove(expert)
    return [new.pop(0) if expert is None else expert for expert in kept]


def _wire(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # gloo knows no FP8


def spread(
    model: LanguageModel,
    group: Group | None,
    balancing: Balancing,
    loads: Mapping[str, Sequence[int]] | None = None,
) -> list[Layer]:
    """Leaves a model without weights this rank's experts, and lets it ask others for theirs.

    Experts are placed by `loads`, or as if all had the same. Without a group all are here, and only
    their loads are counted. Raises ValueError for a model that has no experts, loads of another
    model, and experts that are not equally many on each rank.
    """
    redundant = balancing.redundant
    ranks = 1 if group is None else group.size
    layers = []
    for name, module in list(model.named_modules()):
        for child in list(module.children()):
            if isinstance(child, Stack):
                if (child.total + redundant) % ranks:
                    raise ValueError(
                        f"{child.total} experts and {redundant} copies are not the same number on "
                        f"each of {ranks} ranks: {-child.total % ranks} copies are, or {ranks} more"
                    )
                layer = Layer(name, child, group)
                load = [1] * child.total if loads is None else loads.get(name, [])
                if len(load) != child.total:
                    raise ValueError(f"the load file has no loads of {child.total} experts {name}")
                placement = balancing.place(load, ranks)
                child.hold(placement[layer.rank])
                layer.hold(placement)
                _route(module, layer)
                layers.append(layer)
    if not layers:
        raise ValueError(f"{model.config.model} has no routed experts that could be spread")
    return layers


def _route(module: nn.Module, layer: Layer) -> None:
    """Every call of a block goes through its layer."""

    def routing(method: Any) -> Any:
        @wraps(method)
        def call(*inputs: Any, **named: Any) -> Any:
            sent = layer.sent
            with routed(layer):
                result = method(*inputs, **named)
            if layer.sent != sent + 1 or layer.given_back != layer.sent:
                raise RuntimeError(f"{layer.name} does not compute its experts by rows")
            return result

        return call

    for name in filter(METHODS.fullmatch, dir(type(module))):
        setattr(module, name, routing(getattr(module, name)))
