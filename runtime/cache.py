"""The KV cache of decoding; for MLA, a cache of latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Cache:
    """Caches up to `capacity` tokens of `batch` sequences, for every module that appends to it.

    Entries have names, for MLA those of the normed latent and the rotated shared key. Memory is
    allocated when a module first appends, with the dtype and device of the entry.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._lengths: dict[tuple[nn.Module, str], int] = {}

    def append(self, module: nn.Module, **entries: Tensor) -> tuple[Tensor, ...]:
        """Appends entries [batch, new, ...] and returns all so far, [batch, old + new, ...] each.

        The results are views without gradients, valid until the next append.
        Raises ValueError if the capacity is exceeded or the batch size differs.
        """
        return tuple(self._append((module, name), entry) for name, entry in entries.items())

    def _append(self, key: tuple[nn.Module, str], entry: Tensor) -> Tensor:
        old = self._lengths.get(key, 0)
        length = old + entry.shape[1]
        if entry.shape[0] != self.batch:
            raise ValueError(f"the cache is for a batch of {self.batch}, got {entry.shape[0]}")
        if length > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens of each sequence, {length} do not fit: "
                f"make it with a larger capacity"
            )
        if key not in self._buffers:
            shape = (self.batch, self.capacity, *entry.shape[2:])
            self._buffers[key] = torch.empty(shape, dtype=entry.dtype, device=entry.device)
        buffer = self._buffers[key]
        buffer.narrow(1, old, entry.shape[1]).copy_(entry.detach())
        self._lengths[key] = length
        return buffer.narrow(1, 0, length)

    def attend(self, attention: Callable[..., Tensor], *operands: Tensor, **numbers: Any) -> Tensor:
        """`attention` of queries to what `append` returned, both among the operands."""
        return attention(*operands, **numbers)

    def each(
        self, function: Callable[..., Any], remembered: tuple[int, ...], *operands: Tensor
    ) -> Any:
        """`function` of the tokens of each sequence; the operands `remembered`, by number, are what
        `append` returned."""
        return function(*operands)

    def last(self, x: Tensor) -> Tensor:
        """Of states x [batch, new, hidden] those whose next token is asked for: [batch, hidden]."""
        return x[:, -1]

    @property
    def bytes(self) -> int:
        """Memory allocated so far, in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
