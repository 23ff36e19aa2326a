"""Tokens to the ranks that hold their experts by torch's symmetric memory, as `Exchange` does.

`torch.ops.symm_mem.all_to_all_vdev_2d` (NVSHMEM) has every rank read its rows out of the memory of
the others, in one kernel, inside nodes and across. It is made for one row of each token and expert,
by expert and aligned. Here its "expert" is a rank: a token goes once to each rank that holds some
of its experts (of 8 experts, chosen from 256 on 8 ranks by chance, to 5.3), and rows arrive and are
summed in the order of `Exchange`, so that results have the same bits. **Tested against a stand-in
with the interface of torch 2.13, never on a GPU.**
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, barrier

from .exchange import Exchange, split_bytes

ALIGNMENT = 16
"""Bytes to whose multiples rows are filled up: what a thread moves at once."""


def symmetric_memory() -> Any:
    """torch's module of it, which is imported by those who use it alone."""
    return import_module("torch.distributed._symmetric_memory")


class SymmetricBuffers:
    """Memory that the ranks of a group read of one another: one for all layers of a model.

    The operator ends when a rank has read its own rows, not when the others have; each begins with
    a barrier. So what others read, and where they leave their counts, is used again two exchanges
    later at the earliest: all ranks have passed the barrier of the one between. Exchanges have to
    follow one another on one stream, in the same order on all ranks.
    """

    def __init__(
        self, world: ProcessGroup, group: ProcessGroup, device: torch.device, rows: int, width: int
    ) -> None:
        """For `rows` rows of `width` bytes, as many as are sent, or arrive, at the most.

        All ranks of `world` call it together and with equal sizes, also those that exchange
        nothing: NVSHMEM allocates, and makes its teams, on all ranks at once. Raises RuntimeError
        where the device has no symmetric memory.
        """
        memory = symmetric_memory()
        memory.set_backend("NVSHMEM")
        self.group, self.turn = group, 0

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            made: Tensor = memory.empty(*size, dtype=dtype, device=device)
            memory.rendezvous(made, group)
            return made

        size, ranks = rows * _aligned(width), group.size()
        self.given = [empty(size, dtype=torch.uint8) for _ in range(2)]
        self.found = empty(size, dtype=torch.uint8)
        self.counts = empty(ranks, dtype=torch.int64)
        self.arrived = [empty(2, ranks, dtype=torch.int64) for _ in range(2)]
        barrier(world)
        self.exchange([self.found.new_empty(0, width)], [0] * ranks, 0)

    def exchange(self, parts: Sequence[Tensor], sent: Sequence[int], arriving: int) -> Tensor:
        """Rows to the ranks of the group, `sent` to each: uint8 [rows, width] of several tensors.

        Returns those that arrive, rank by rank, with their tensors side by side: [arriving,
        widths], a part of memory that the next exchange writes. Raises ValueError where there is
        no room for as many.
        """
        width = _aligned(sum(part.shape[-1] for part in parts))
        rows = self.found.numel() // width
        if max(sum(sent), arriving) > rows:
            raise ValueError(f"{max(sum(sent), arriving)} rows of {width} bytes, room for {rows}")
        self.turn = 1 - self.turn
        given, found = (
            one[: rows * width].view(rows, width) for one in (self.given[self.turn], self.found)
        )
        first = 0
        for part in parts:
            given[: len(part), first : first + part.shape[-1]] = part
            first += part.shape[-1]
        # The host waits for nothing: such a small copy has left its memory when the call returns.
        self.counts.copy_(torch.tensor(sent), non_blocking=True)
        torch.ops.symm_mem.all_to_all_vdev_2d(
            given, found, self.counts, self.arrived[self.turn], self.group.group_name
        )
        return found[:arriving]


class SymmetricExchange(Exchange):
    """`Exchange` by symmetric memory. How many tokens come is told by torch's all-to-all."""

    def __init__(
        self,
        buffers: SymmetricBuffers,
        count: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__(buffers.group, count, waiting)
        self.buffers = buffers

    def _moved(
        self, parts: Sequence[Tensor], out: list[int], into: list[int]
    ) -> tuple[Tensor, ...]:
        with self.waiting():
            found = self.buffers.exchange(parts, out, sum(into))
        return split_bytes(found, parts)


def _aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT
