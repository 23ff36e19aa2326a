"""Load balancing without an auxiliary loss: the routing bias and the utilization of experts.

DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce

from ..stage import is_inside
from ..weights import Stack, Tensors


@dataclass(frozen=True)
class Router:
    """The router of one layer: `name` is that of the MoE module, `bias` float32 [experts]."""

    name: str
    bias: Tensor | None


@dataclass(frozen=True)
class ExpertUtilization:
    """The utilization of the experts of a layer over some tokens."""

    max_vio: float
    """The load of the busiest expert over the mean, minus 1: 0 is perfect (arXiv 2408.15664)."""
    entropy: float
    """Entropy of the load over its maximum: 1 is perfect, 0 is one expert for all tokens."""
    bias_range: float
    """The largest bias minus the smallest."""
    load: tuple[int, ...]


class Balance:
    """Counts the load of a step, and updates the bias of each expert once, at its end."""

    def __init__(self, model: nn.Module, within: Collection[str] | None = None) -> None:
        """The routers in the modules named `within`; by default all of the model."""
        self.routers = [
            router
            for router in _routers(model)
            if within is None or any(is_inside(router.name, module) for module in within)
        ]
        self.load: Tensor | None = None

    def add(self, load: Sequence[Tensor]) -> None:
        """Adds the load of a micro-batch, `Loss.load`: int64 [layers, experts] or [experts].

        Raises ValueError if the number of loads is not that of the layers.
        """
        rows = [row for part in load for row in part.reshape(-1, part.shape[-1])]
        if len(rows) != len(self.routers):
            raise ValueError(
                f"loads of {len(rows)} layers, but {len(self.routers)} layers have experts"
            )
        if rows:
            # Layers may have different numbers of experts.
            flat = torch.cat(rows)
            self.load = flat if self.load is None else self.load + flat
            self._sizes = [len(row) for row in rows]

    def reduce(self, group: ProcessGroup) -> None:
        """Sums the load over all ranks."""
        if self.load is not None:
            all_reduce(self.load, group=group)

    @torch.no_grad()
    def finish(self, speed: float) -> dict[str, ExpertUtilization]:
        """Moves the bias of each expert by `speed`: up if its load was below the mean, down if
        above. Returns the utilization of each layer, and resets the load.

        The comparison is between integers, hence exact.
        """
        if self.load is None:
            return {}
        for router, load in zip(self.routers, self.load.split(self._sizes), strict=True):
            if router.bias is not None:
                missing = load.sum() - len(load) * load
                router.bias.add_(missing.sign().to(router.bias), alpha=speed)
        # Of all layers at once: for each by itself the host would wait for a GPU.
        biases = [one.bias for one in self.routers if one.bias is not None]
        ranges = iter(torch.cat(biases).cpu().split([*map(len, biases)]) if biases else ())
        loads = self.load.cpu().split(self._sizes)
        self.load = None
        return {
            router.name: utilization(load, None if router.bias is None else next(ranges))
            for router, load in zip(self.routers, loads, strict=True)
        }


def utilization(load: Tensor, bias: Tensor | None) -> ExpertUtilization:
    """Computes the metrics of a load, int64 [experts]."""
    counts = load.tolist()
    total, experts = sum(counts), len(counts)
    shares = [count / total for count in counts if count] if total else []
    entropy = -sum(share * math.log(share) for share in shares)
    return ExpertUtilization(
        max_vio=max(counts) * experts / total - 1 if total else 0.0,
        entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        bias_range=float(bias.max() - bias.min()) if bias is not None else 0.0,
        load=tuple(counts),
    )


def _routers(model: nn.Module) -> Iterator[Router]:
    """The layers with experts, in the order of their loads.

    They are the modules that hold a stack of experts; a bias is a buffer in them with one number
    per expert, those included that give back their tokens and have no weights.
    """
    for name, module in model.named_modules():
        for child in module.children():
            if isinstance(child, Stack):
                yield Router(name, _bias(module, child.total))


def _bias(module: nn.Module, experts: int) -> Tensor | None:
    for group in module.children():
        if isinstance(group, Tensors):
            for name, declared in group.declarations.items():
                if declared.buffer and len(declared.shape) == 1 and declared.shape[0] >= experts:
                    return getattr(group, name)  # type: ignore[no-any-return]
    return None
