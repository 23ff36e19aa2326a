"""Tokens to the ranks that hold their experts, and back: all-to-alls over an expert group.

A token goes once to each rank that holds one of its experts. DeepSeek-V3 report, section 3.2.2, but
for its route by nodes: here each token goes straight to its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single


@dataclass(frozen=True)
class Handle:
    """How tokens were sent: enough to send rows the same way again, and back."""

    tokens: Tensor
    """int64 [sent]: the number of each token that was sent, rank by rank."""
    sent: list[int]
    """Tokens to each rank of the group."""
    arrived: list[int]
    """Tokens from each rank of the group."""
    shape: torch.Size
    """The leading dimensions of the tokens, such as [batch, seq]."""


class Exchange:
    """Between the ranks of a group, each with `count / ranks` experts that follow one another."""

    def __init__(
        self,
        group: ProcessGroup,
        count: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`waiting` is entered around each wait for the other ranks."""
        self.group, self.ranks, self.waiting = group, group.size(), waiting
        self.each = count // self.ranks
        self.first = group.rank() * self.each

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | Handle, ...]:
        """Rows [.., width] of each token, the last of them its experts int64 [.., k].

        Returns the rows that arrived, [arrived, width], rank by rank in the order of their tokens,
        the last of them with experts counted from this rank's first and -1 for those of others;
        then the handle.
        """
        experts = rows[-1].flatten(0, -2)
        to = torch.zeros(len(experts), self.ranks, dtype=torch.bool, device=experts.device)
        to.scatter_(1, experts // self.each, True)
        ranks, tokens = to.t().nonzero(as_tuple=True)
        sent = torch.bincount(ranks, minlength=self.ranks)
        arrived = torch.empty_like(sent)
        with self.waiting():
            all_to_all_single(arrived, sent, group=self.group)
        handle = Handle(tokens, sent.tolist(), arrived.tolist(), rows[-1].shape[:-1])
        *others, there = self._send(rows, handle)
        mine = (there >= self.first) & (there < self.first + self.each)
        return (*others, torch.where(mine, there - self.first, -1), handle)

    def dispatch_again(self, *given: Tensor | Handle) -> Tensor | tuple[Tensor, ...]:
        """Rows of the tokens by the way of an earlier dispatch; the handle comes last."""
        *rows, handle = given
        assert isinstance(handle, Handle)
        found = self._send([row for row in rows if isinstance(row, Tensor)], handle)
        return found[0] if len(found) == 1 else found

    def combine(self, *given: Tensor | Handle) -> Tensor | tuple[Tensor, ...]:
        """Rows [arrived, width] back to the ranks of their tokens, and summed there: [.., width].

        Sums are in the order of the ranks. The handle comes last.
        """
        *rows, handle = given
        assert isinstance(handle, Handle)
        found = tuple(self._back(row, handle) for row in rows if isinstance(row, Tensor))
        return found[0] if len(found) == 1 else found

    def _send(self, rows: list[Tensor] | tuple[Tensor, ...], handle: Handle) -> tuple[Tensor, ...]:
        return tuple(
            self._exchanged(row.flatten(0, -2)[handle.tokens], handle.sent, handle.arrived)
            for row in rows
        )

    def _back(self, rows: Tensor, handle: Handle) -> Tensor:
        back = self._exchanged(rows, handle.arrived, handle.sent)
        total = rows.new_zeros(handle.shape.numel(), rows.shape[-1])
        return total.index_add_(0, handle.tokens, back).view(*handle.shape, rows.shape[-1])

    def _exchanged(self, rows: Tensor, out: list[int], into: list[int]) -> Tensor:
        found, given = rows.new_empty(sum(into), rows.shape[-1]), rows.contiguous()
        wire = torch.uint8 if rows.itemsize == 1 else rows.dtype  # transports know nothing of FP8
        with self.waiting():
            all_to_all_single(found.view(wire), given.view(wire), into, out, group=self.group)
        return found
