"""Ranges of tensors that several ranks keep together, and whole tensors made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, recv, send

from .ranks import all_gather_objects


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor of a `shape` from the element `start` on, in their order: `values` [n].

    A slice of a flat buffer of weights begins and ends anywhere in a matrix.
    """

    values: Tensor
    shape: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, values: Tensor, shape: tuple[int, ...], start: int) -> Piece | Tensor:
        """The tensor itself where the elements are all of it."""
        whole = values.numel() == torch.Size(shape).numel()
        return values.view(shape) if whole else cls(values, shape, start)


def values_of(one: Tensor | Piece) -> Tensor:
    return one.values if isinstance(one, Piece) else one


def take(one: Tensor | Piece, whole: Tensor) -> None:
    """Copies what a whole tensor has of it."""
    if isinstance(one, Piece):
        whole = whole.reshape(-1)[one.start : one.start + one.values.numel()]
    values_of(one).copy_(whole)


def assemble(
    tensors: Mapping[str, Tensor | Piece], group: ProcessGroup | None
) -> dict[str, Tensor]:
    """Whole tensors: those that are, and of each that is in pieces on the rank with the largest.

    All ranks of the group call it. Values are on the CPU.
    """
    whole = {name: one for name, one in tensors.items() if isinstance(one, Tensor)}
    pieces = {name: one for name, one in tensors.items() if isinstance(one, Piece)}
    own = 0 if group is None else group.rank()
    found: dict[str, list[tuple[int, int, int]]] = {}
    extents = {name: (one.start, one.values.numel()) for name, one in pieces.items()}
    for rank, every in enumerate(all_gather_objects(group, extents)):
        for name, (start, count) in every.items():
            found.setdefault(name, []).append((start, rank, count))
    # In an order that all ranks have, so that none waits for ever.
    for name, parts in sorted(found.items()):
        largest = max(parts, key=lambda part: (part[2], -part[1]))[1]
        if own == largest:
            whole[name] = _joined(pieces[name], sorted(parts), own, group)
        elif name in pieces:
            send(pieces[name].values, group_dst=largest, group=group)
    return whole


def _joined(
    piece: Piece, parts: list[tuple[int, int, int]], own: int, group: ProcessGroup | None
) -> Tensor:
    """A tensor of all its parts, each the first element, the rank and how many there are."""
    made = piece.values.new_empty(piece.shape)
    flat, end = made.view(-1), 0
    for start, rank, count in parts:
        assert start == end, "pieces follow one another"
        end = start + count
        if rank == own:
            flat[start:end] = piece.values
        else:
            recv(flat[start:end], group_src=rank, group=group)
    assert end == flat.numel(), "pieces are all of a tensor"
    return made
