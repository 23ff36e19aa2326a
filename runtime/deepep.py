"""Tokens to the ranks that hold their experts by DeepEP, with what `Exchange` promises.

`deep_ep.ElasticBuffer` (DeepEP V2: SM90, NCCL 2.30) sends a token once to each rank of its experts,
across nodes and inside them, by kernels of its own; https://github.com/deepseek-ai/DeepEP. It takes
bfloat16 [tokens, hidden], or E4M3 with a float32 scale for each 128 numbers, and gives the numbers
of experts counted from this rank's first, -1 for those of others. **Tested against a stand-in with
the published interface, never with the library.**
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@cache
def deep_ep_buffer(group: ProcessGroup, **sizes: int) -> Any:
    """DeepEP's memory for exchanges over a group: layers alike have the same, one after the other.

    All ranks of the group call it together. Raises ModuleNotFoundError where there is no DeepEP.
    """
    return import_module("deep_ep").ElasticBuffer(group, **sizes)


@dataclass(frozen=True)
class DeepEPHandle:
    """How tokens were sent: DeepEP's own handle, and the leading dimensions of the tokens."""

    own: Any
    shape: torch.Size


class DeepEPExchange:
    """Between the ranks of a group, each with `count / ranks` experts that follow one another."""

    def __init__(
        self,
        buffers: Callable[..., Any],
        group: ProcessGroup,
        count: int,
        tokens: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`tokens` are the most that a rank sends at a time; `buffers` makes `ElasticBuffer`s, the
        same for layers alike. `waiting` is entered around each wait for the other ranks."""
        self.buffers, self.group, self.count, self.tokens = buffers, group, count, tokens
        self.waiting = waiting

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | DeepEPHandle, ...]:
        """As `Exchange.dispatch`, for x [.., hidden] or its numbers in FP8 and scales, weights
        [.., k] and experts int64 [.., k]. The order in which rows arrive is DeepEP's, that of
        ranks and tokens."""
        *x, weight, experts = rows
        shape, k = experts.shape[:-1], experts.shape[-1]
        self.buffer = self.buffers(
            self.group, num_max_tokens_per_rank=self.tokens, hidden=x[0].shape[-1], num_topk=k,
            deterministic=True,
        )  # fmt: skip
        with self.waiting():
            found, there, weights, own, _ = self.buffer.dispatch(
                _packed(x),
                topk_idx=experts.flatten(0, -2),
                topk_weights=weight.flatten(0, -2).float(),
                num_experts=self.count,
            )
        handle = DeepEPHandle(own, shape)
        return (*_several(found), weights.to(weight.dtype), there.to(experts.dtype), handle)

    def dispatch_again(self, *given: Tensor | DeepEPHandle) -> Tensor | tuple[Tensor, ...]:
        """As `Exchange.dispatch_again`: no rank is told how many come."""
        *rows, handle = given
        assert isinstance(handle, DeepEPHandle)
        x = [row for row in rows if isinstance(row, Tensor)]
        with self.waiting():
            found, *_ = self.buffer.dispatch(_packed(x), handle=handle.own, num_experts=self.count)
        several: tuple[Tensor, ...] = _several(found)
        return several[0] if len(several) == 1 else several

    def combine(self, *given: Tensor | DeepEPHandle) -> Tensor | tuple[Tensor, ...]:
        """As `Exchange.combine`, of y [arrived, hidden] and maybe gradients of weights
        [arrived, k], which are zero for experts of other ranks."""
        *rows, handle = given
        assert isinstance(handle, DeepEPHandle)
        y, *weights = (row for row in rows if isinstance(row, Tensor))
        with self.waiting():
            sums, d_weights, _ = self.buffer.combine(
                y, handle.own, topk_weights=weights[0].float() if weights else None
            )
        back: Tensor = sums.unflatten(0, handle.shape)
        if not weights:
            return back
        return back, d_weights.to(weights[0].dtype).unflatten(0, handle.shape)


def _packed(x: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Rows as DeepEP takes them: one tensor, or numbers and their scales."""
    rows = tuple(row.flatten(0, -2).contiguous() for row in x)
    return rows[0] if len(rows) == 1 else rows


def _several(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)
