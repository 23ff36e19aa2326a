"""What a rank sends, counted operation by operation while it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..exchange import Exchange, NodeExchange, Way
from ..model import LanguageModel
from .waits import Waits

PURPOSES = {"the sums of gradients": "gradients", "new weights": "parameters"}
"""What a rank waits for, and the purpose of what it sends meanwhile, as plans call it."""


@dataclass
class SentTraffic:
    """What a rank sent for one purpose in a step."""

    messages: int = 0
    bytes: int = 0

    def add(self, messages: int, size: int) -> None:
        self.messages += messages
        self.bytes += size


class Counter(TorchDispatchMode):
    """Counts what is sent while it is entered, by purpose; `waits` are those of the trainer.

    `sums` are those of losses, loads of experts and squares, which plans leave out.
    """

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.exchanging = ""
        """Whether tokens are on their way to experts (`dispatch`) or back (`combine`)."""
        self.sent: dict[str, SentTraffic] = defaultdict(SentTraffic)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here: to skip it, torch would load all of Dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        return result

    def _count(self, name: str, args: Sequence[Any]) -> None:
        groups = [leaf for leaf in args if isinstance(leaf, torch.ScriptObject)]
        if name not in COUNTED or not groups:
            return
        group = ProcessGroup.unbox(groups[0])
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        others = group.size() - 1
        # Where parts are equal, all but one leave: directly, or by a ring, with as many messages.
        size = max(t.nbytes for t in tensors) * others // (others + 1)
        traffic = self.sent[self._purpose(name)]
        match name:
            case "send":
                traffic.add(1, tensors[0].nbytes)
            case "alltoall_base_":
                given, splits = args[1], args[4]
                if splits:
                    own = splits[group.rank()]
                    size = given.nbytes * (sum(splits) - own) // max(1, sum(splits))
                traffic.add(others, size)
            case "allreduce_":
                traffic.add(2 * others, 2 * size)
            case _:
                traffic.add(others, size)

    def _purpose(self, name: str) -> str:
        what = self.waits.now.what if self.waits.now else ""
        if what in PURPOSES:
            return PURPOSES[what]
        if name == "send":
            return "pipeline"
        return self.exchanging if name == "alltoall_base_" else "sums"


COUNTED = ("send", "alltoall_base_", "allreduce_", "_reduce_scatter_base_", "_allgather_base_")
"""Operations of torch.distributed that a step has."""


class CountedExchange(Exchange):
    """Says to a counter what it sends tokens for."""

    counter: Counter

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | Way, ...]:
        self.counter.exchanging = "dispatch"
        return super().dispatch(*rows)

    def dispatch_again(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        self.counter.exchanging = "dispatch"
        return super().dispatch_again(*given)

    def combine(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        self.counter.exchanging = "combine"
        return super().combine(*given)


def count_exchanges(
    model: LanguageModel, counter: Counter, kind: type[CountedExchange] = CountedExchange
) -> None:
    """Lets the exchanges of a model say to a counter what they send."""

    def counted(before: Exchange) -> CountedExchange:
        made = kind(before.group, before.each * before.ranks, before.waiting)
        made.counter = counter
        return made

    for module in model.modules():
        before = getattr(module, "exchange", None)
        if isinstance(before, NodeExchange):
            before.across, before.inside = counted(before.across), counted(before.inside)
        elif isinstance(before, Exchange):
            setattr(module, "exchange", counted(before))  # noqa: B010
