"""Weights of one element type that the same ranks hold, in one flat buffer with equal slices.

Each rank sums the gradients in its slice over all of them. With ZeRO-1 (arXiv 1910.02054) it keeps
the optimizer's state of that slice only, updates it, and gets the other slices from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_to_all_single, get_process_group_ranks

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # their names before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

from .waits import Waits

ROW = 64
"""A slice is a whole number of rows: 128 bytes of bfloat16, and what the norm adds up at first."""
CHUNK = 1 << 22
"""Elements that are sent at a time where sums are in the order of the ranks."""


class Bucket:
    """The weights, which become views of `flat` [ranks * each], and their gradients in float32."""

    def __init__(self, weights: Mapping[str, nn.Parameter], group: ProcessGroup, waits: Waits):
        self.group, self.waits = group, waits
        total, ranks = sum(weight.numel() for weight in weights.values()), group.size()
        self.each = -(-total // (ranks * ROW)) * ROW
        one = next(iter(weights.values()))
        self.flat = torch.zeros(ranks * self.each, dtype=one.dtype, device=one.device)
        self.gradients: Tensor | None = None
        self.places: dict[str, range] = {}
        start = 0
        # Kernels want weights at multiples of 16 bytes: so lies each whose size is such a multiple
        # if those whose sizes have larger powers of two come first.
        for name in sorted(weights, key=lambda n: (-_power_of_two(weights[n].numel()), n)):
            weight = weights[name]
            self.places[name] = range(start, start + weight.numel())
            view = self.view(self.flat, name, weight)
            view.copy_(weight.detach())
            weight.data = view
            start += weight.numel()

    @property
    def own(self) -> slice:
        """Of the flat buffers: this rank's."""
        return slice(self.group.rank() * self.each, (self.group.rank() + 1) * self.each)

    def view(self, flat: Tensor, name: str, weight: Tensor) -> Tensor:
        place = self.places[name]
        return flat[place.start : place.stop].view(weight.shape)

    def gradient(self, name: str, weight: Tensor) -> Tensor:
        """Where the gradient of a weight is; the buffer stays from step to step."""
        if self.gradients is None:
            self.gradients = torch.zeros_like(self.flat, dtype=torch.float32)
        return self.view(self.gradients, name, weight)

    def reduce(self, whole: bool) -> None:
        """Sums the gradients of this rank's slice over all ranks; `whole`: of all slices."""
        assert self.gradients is not None
        with self._waiting("the sums of gradients"):
            if self.gradients.is_cpu:
                _reduce_scatter_in_order(self.gradients, self.group)
            else:
                reduce_scatter_single(self.gradients[self.own], self.gradients, group=self.group)
            if whole:
                all_gather_single(self.gradients, self.gradients[self.own], group=self.group)

    def squares(self) -> Tensor:
        """The gradients of this rank's slice by rows, for the norm."""
        assert self.gradients is not None
        return self.gradients[self.own].view(-1, ROW)

    def gather(self) -> None:
        """Takes the slices of the weights that other ranks have updated."""
        with self._waiting("new weights"), torch.no_grad():
            all_gather_single(self.flat, self.flat[self.own], group=self.group)

    def _waiting(self, what: str) -> AbstractContextManager[None]:
        return self.waits.waiting(what, get_process_group_ranks(self.group))


def _power_of_two(size: int) -> int:
    """The largest power of two that divides a size."""
    return size & -size


def _reduce_scatter_in_order(flat: Tensor, group: ProcessGroup) -> None:
    """Makes each rank's slice of `flat` the sum of all ranks', added up in the order of the ranks.

    For gloo, whose reduce-scatter sends as much as an all-reduce, in an order of its own.
    """
    slices, own = flat.view(group.size(), -1), group.rank()
    step = max(ROW, CHUNK // group.size())
    for first in range(0, slices.shape[1], step):
        given = slices[:, first : first + step].contiguous()
        found = torch.empty_like(given)
        all_to_all_single(found, given, group=group)
        total = found[0]
        for one in found[1:]:
            total += one
        slices[own, first : first + step] = total
