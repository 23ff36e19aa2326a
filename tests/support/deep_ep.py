"""A stand-in for DeepEP: `ElasticBuffer` with the published names, and what it asks of tensors.

Of https://github.com/deepseek-ai/DeepEP, `deep_ep/buffers/elastic.py`. Tokens go by `Exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from runtime.exchange import Exchange

Given = Tensor | tuple[Tensor, Tensor]


@dataclass
class EPHandle:
    """What a dispatch of the stand-in returns for the next ones."""

    num_experts: int
    way: Any
    topk: int


class ElasticBuffer:
    made: int = 0
    """How many there are."""

    def __init__(
        self, group: ProcessGroup, num_bytes: int | None = None, *,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        assert num_bytes is None and deterministic
        self.group, self.hidden = group, hidden
        self.most, self.topk = num_max_tokens_per_rank, num_topk
        ElasticBuffer.made += 1

    def dispatch(
        self,
        x: Given,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        handle: EPHandle | None = None,
    ) -> tuple[Given, Tensor | None, Tensor | None, EPHandle, object]:
        rows = self._checked(x)
        # The library derives from the number of experts how many SMs it takes, always.
        assert num_experts is not None
        exchange = Exchange(self.group, num_experts)
        if handle is not None:
            assert topk_idx is None and topk_weights is None and handle.num_experts == num_experts
            found: Any = exchange.dispatch_again(*rows, handle.way)
            return found, None, None, handle, object()
        assert topk_idx is not None and topk_weights is not None
        assert topk_idx.shape == topk_weights.shape == (len(rows[0]), self.topk)
        assert (topk_idx.dtype, topk_weights.dtype) == (torch.int64, torch.float32)
        *there, weights, experts, way = exchange.dispatch(*rows, topk_weights, topk_idx)
        assert isinstance(weights, Tensor) and isinstance(experts, Tensor)
        arrived: Any = there[0] if len(there) == 1 else tuple(there)
        return arrived, experts, weights, EPHandle(num_experts, way, self.topk), object()

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, object]:
        assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.shape[1] == self.hidden
        exchange = Exchange(self.group, handle.num_experts)
        if topk_weights is None:
            (back,) = (exchange.combine(x, handle.way),)
            assert isinstance(back, Tensor)
            return back, None, object()
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == (len(x), handle.topk)
        back, weights = exchange.combine(x, topk_weights, handle.way)
        return back, weights, object()

    def _checked(self, x: Given) -> tuple[Tensor, ...]:
        rows = x if isinstance(x, tuple) else (x,)
        assert rows[0].shape == (len(rows[0]), self.hidden) and len(rows[0]) <= self.most
        assert all(row.is_contiguous() for row in rows)
        if isinstance(x, tuple):
            assert [row.dtype for row in x] == [torch.float8_e4m3fn, torch.float32]
            assert x[1].shape == (len(x[0]), self.hidden // 128)
        else:
            assert x.dtype == torch.bfloat16
        return rows
