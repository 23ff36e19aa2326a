"""Balance without an auxiliary loss: routing bias, and how evenly experts are used.

DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce

from ..weights import Stack, Tensors


@dataclass(frozen=True)
class Router:
    """What chooses the experts of one layer: `name` is the module, `bias` float32 [experts]."""

    name: str
    bias: Tensor | None


@dataclass(frozen=True)
class Use:
    """How evenly a layer's experts were used over some tokens."""

    max_vio: float
    """The load of the busiest expert over the mean, less 1: 0 is perfect (arXiv 2408.15664)."""
    entropy: float
    """Of the load, over that of perfect balance: 1 is perfect, 0 is one expert for all."""
    bias_range: float
    """The largest bias less the smallest."""
    load: tuple[int, ...]


class Balance:
    """Counts the load of a step, and moves the bias of each expert once, at its end."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = list(_routers(model))
        self.load: Tensor | None = None

    def add(self, load: Sequence[Tensor]) -> None:
        """Adds the load of a micro-batch, `Loss.load`: int64 [layers, experts] or [experts].

        Raises ValueError if the model has other layers than its loads have.
        """
        rows = [row for part in load for row in part.reshape(-1, part.shape[-1])]
        if len(rows) != len(self.routers):
            raise ValueError(f"loads of {len(rows)} layers, but {len(self.routers)} with experts")
        if rows:
            # Layers may have different numbers of experts.
            flat = torch.cat(rows)
            self.load = flat if self.load is None else self.load + flat
            self._sizes = [len(row) for row in rows]

    def reduce(self, group: ProcessGroup) -> None:
        """Makes the load that of all ranks."""
        if self.load is not None:
            all_reduce(self.load, group=group)

    @torch.no_grad()
    def finish(self, speed: float) -> dict[str, Use]:
        """Moves the bias of each expert by `speed`: up if its load was below the mean, down if
        above. Gives the use of each layer, and begins anew.

        The comparison is between whole numbers, hence exact whatever a step was computed in.
        """
        if self.load is None:
            return {}
        uses = {}
        for router, load in zip(self.routers, self.load.split(self._sizes), strict=True):
            if router.bias is not None:
                missing = load.sum() - len(load) * load
                router.bias.add_(missing.sign().to(router.bias), alpha=speed)
            uses[router.name] = use(load, router.bias)
        self.load = None
        return uses


def use(load: Tensor, bias: Tensor | None) -> Use:
    """The measures of a load, int64 [experts]."""
    counts = load.tolist()
    total, experts = sum(counts), len(counts)
    shares = [count / total for count in counts if count] if total else []
    entropy = -sum(share * math.log(share) for share in shares)
    return Use(
        max_vio=max(counts) * experts / total - 1 if total else 0.0,
        entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        bias_range=float(bias.max() - bias.min()) if bias is not None else 0.0,
        load=tuple(counts),
    )


def _routers(model: nn.Module) -> Iterator[Router]:
    """The layers with experts, in the order in which the model gives their load.

    They are the modules that hold a stack of experts; a bias is a buffer in them with a number
    for each expert.
    """
    for name, module in model.named_modules():
        for child in module.children():
            if isinstance(child, Stack):
                yield Router(name, _bias(module, child.count))


def _bias(module: nn.Module, experts: int) -> Tensor | None:
    for group in module.children():
        if isinstance(group, Tensors):
            for name, declared in group.declarations.items():
                if declared.buffer and declared.shape == (experts,):
                    return getattr(group, name)  # type: ignore[no-any-return]
    return None
