"""Tokens to the ranks that hold their experts, and back: all-to-alls over an expert group.

A token goes once to each rank that holds one of its experts; between nodes it goes once to each
node, and from there to the ranks inside. DeepSeek-V3 report, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single

INDEX = torch.int16
"""The type of the numbers of experts on their way, of which there are less than 2^15."""


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


@dataclass(frozen=True)
class NodeHandle:
    """How tokens were sent to nodes, and on inside them."""

    across: Handle
    inside: Handle


Way = Handle | NodeHandle


class Exchange:
    """Between the ranks of a group, each with `count / ranks` experts that follow one another."""

    def __init__(
        self,
        group: ProcessGroup,
        count: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`waiting` is entered around each wait for the other ranks."""
        if count > 1 << 15:
            raise ValueError(f"{count} experts have no numbers of 16 bits")
        self.group, self.ranks, self.waiting = group, group.size(), waiting
        self.each = count // self.ranks
        self.first = group.rank() * self.each

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | Way, ...]:
        """Rows [.., width] of each token, the last of them its experts int64 [.., k].

        Returns the rows that arrived, [arrived, width], rank by rank in the order of their tokens,
        the last of them with experts counted from this rank's first and -1 for those of others;
        then the handle. Experts of -1, and from `count` on, are on no rank of the group.
        """
        *others, experts = rows
        handle = self._route(experts)
        *found, there = self._send([*others, experts.to(INDEX)], handle)
        there = there.to(experts.dtype)
        mine = (there >= self.first) & (there < self.first + self.each)
        return (*found, torch.where(mine, there - self.first, -1), handle)

    def _route(self, experts: Tensor) -> Handle:
        """To which ranks tokens go, and how many come."""
        flat = experts.flatten(0, -2)
        nowhere = self.ranks
        to = torch.zeros(len(flat), nowhere + 1, dtype=torch.bool, device=flat.device)
        absent = (flat < 0) | (flat >= self.ranks * self.each)
        to.scatter_(1, torch.where(absent, nowhere, flat // self.each), True)
        to = to[:, :nowhere].t().contiguous()
        counts = to.sum(1)
        arriving = torch.empty_like(counts)
        with self.waiting():
            all_to_all_single(arriving, counts, group=self.group)
        # The host waits here, and nowhere else: sizes of what is sent and allocated are its own.
        sent, arrived = torch.stack([counts, arriving]).tolist()
        tokens = torch.nonzero_static(to, size=sum(sent))[:, 1]
        return Handle(tokens, sent, arrived, experts.shape[:-1])

    def dispatch_again(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        """Rows of the tokens by the way of an earlier dispatch; the handle comes last."""
        *rows, handle = given
        assert isinstance(handle, Handle)
        found = self._send([row for row in rows if isinstance(row, Tensor)], handle)
        return found[0] if len(found) == 1 else found

    def combine(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        """Rows [arrived, width] back to the ranks of their tokens, and summed there: [.., width].

        Sums are in the order of the ranks. The handle comes last.
        """
        *rows, handle = given
        assert isinstance(handle, Handle)
        back = [row for row in rows if isinstance(row, Tensor)]
        found = tuple(
            self._summed(row, handle) for row in self._exchanged(back, handle.arrived, handle.sent)
        )
        return found[0] if len(found) == 1 else found

    def _send(self, rows: Sequence[Tensor], handle: Handle) -> tuple[Tensor, ...]:
        given = [row.flatten(0, -2)[handle.tokens] for row in rows]
        return self._exchanged(given, handle.sent, handle.arrived)

    def _summed(self, rows: Tensor, handle: Handle) -> Tensor:
        total = rows.new_zeros(handle.shape.numel(), rows.shape[-1])
        # One rank after the other: on a GPU, sums of one call have no order.
        parts = zip(handle.tokens.split(handle.sent), rows.split(handle.sent), strict=True)
        for tokens, part in parts:
            total.index_add_(0, tokens, part)
        return total.view(*handle.shape, rows.shape[-1])

    def _exchanged(
        self, rows: Sequence[Tensor], out: list[int], into: list[int]
    ) -> tuple[Tensor, ...]:
        """Rows of several tensors, as bytes, to the ranks together."""
        parts = [
            row.contiguous().view(-1).view(torch.uint8).view(len(row), row.shape[-1] * row.itemsize)
            for row in rows
        ]
        found = self._moved(parts, out, into)
        return tuple(part.view(row.dtype) for part, row in zip(found, rows, strict=True))

    def _moved(
        self, parts: Sequence[Tensor], out: list[int], into: list[int]
    ) -> tuple[Tensor, ...]:
        """Bytes [rows, width] of several tensors in one all-to-all, those of a row side by side."""
        given = parts[0] if len(parts) == 1 else torch.cat([*parts], -1)
        found = given.new_empty(sum(into), given.shape[-1])
        with self.waiting():
            all_to_all_single(found, given, into, out, group=self.group)
        return (found,) if len(parts) == 1 else split_bytes(found, parts)


def split_bytes(rows: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the bytes of each tensor in rows [n, at least all their widths]."""
    widths = [part.shape[-1] for part in parts]
    split = rows[:, : sum(widths)].split(widths, -1)
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in split)


class NodeExchange:
    """The same between several nodes, each with as many ranks and experts that follow one another.

    A token goes to the rank with the place of its own in each of its nodes, and from there to the
    ranks with its experts; on the way back sums are made in each node first.
    """

    def __init__(
        self,
        across: ProcessGroup,
        inside: ProcessGroup,
        count: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`across` has the ranks with the same place in all nodes, `inside` those of a node."""
        self.across = Exchange(across, count, waiting)
        self.inside = Exchange(inside, self.across.each, waiting)

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | Way, ...]:
        """As `Exchange.dispatch`; rows arrive in another order."""
        *found, across = self.across.dispatch(*rows)
        *found, inside = self.inside.dispatch(*(row for row in found if isinstance(row, Tensor)))
        assert isinstance(across, Handle) and isinstance(inside, Handle)
        return (*found, NodeHandle(across, inside))

    def dispatch_again(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        """As `Exchange.dispatch_again`."""
        *rows, handle = given
        assert isinstance(handle, NodeHandle)
        found = self.across.dispatch_again(*rows, handle.across)
        return self.inside.dispatch_again(*_several(found), handle.inside)

    def combine(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        """As `Exchange.combine`; sums are first in a node, then in the order of the nodes."""
        *rows, handle = given
        assert isinstance(handle, NodeHandle)
        found = self.inside.combine(*rows, handle.inside)
        return self.across.combine(*_several(found), handle.across)


def _several(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found
