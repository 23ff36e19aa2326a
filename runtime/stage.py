"""Pipeline stages of a model: which modules a rank holds, and what a stage gives.

The generated module `stages.py` has a class for each stage, or for stages that differ only in the
number of their first layer. DeepSeek-V3 report, section 3.2.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .module import CheckpointModule
from .weights import Stack


@dataclass(frozen=True)
class StageLoss:
    """What a stage gives for a micro-batch: what the next stage reads, and its terms of the loss.

    Terms of all stages add up to those of `Loss`; None and () where a stage has none.
    """

    sent: tuple[Tensor, ...] = ()
    total: Tensor | None = None
    main: Tensor | None = None
    mtp: tuple[Tensor, ...] = ()
    balance: Tensor | None = None
    load: tuple[Tensor, ...] = ()


class Stage(ABC):
    """A stage of a model that holds at least its modules; `first` is its first layer."""

    def __init__(self, model: CheckpointModule, first: int) -> None:
        self.first, self.dtype, self.device = first, model.dtype, model.device
        for name, child in model.named_children():
            setattr(self, name, child)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor without values, of the model's dtype by default."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    @abstractmethod
    def received(self, batch: int, seq: int) -> tuple[Tensor, ...]:
        """Tensors for what the stage before sends of a micro-batch, without values."""

    @abstractmethod
    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        received: tuple[Tensor, ...],
        position: Tensor | None = None,
        tokens_seen: int = 0,
    ) -> StageLoss:
        """The stage's part of `Model.loss`; every stage takes the whole tokens and labels."""


@dataclass(frozen=True)
class StagePlan:
    """A stage by its class, its first layer and the modules that it holds."""

    stage: type[Stage]
    first: int
    holds: tuple[str, ...]


@dataclass(frozen=True)
class ModelShare:
    """What one rank holds of a model: modules by name, and its part of the experts in them."""

    holds: tuple[str, ...]
    expert_rank: int = 0
    expert_ranks: int = 1


class Absent(nn.Module):
    """In place of a module that another pipeline rank holds."""


def is_inside(name: str, module: str) -> bool:
    """Whether a module or weight is `module` or inside it, by their names."""
    return f"{name}.".startswith(f"{module}.")


def hold(model: nn.Module, share: ModelShare) -> None:
    """Drops all modules but those of a share, what is inside them and what they are inside."""
    names = share.holds
    for name, module in list(model.named_modules()):
        for leaf, _ in list(module.named_children()):
            path = f"{name}.{leaf}" if name else leaf
            if not any(is_inside(path, one) or is_inside(one, path) for one in names):
                module.register_module(leaf, Absent())
    for module in model.modules():
        if isinstance(module, Stack):
            each = module.total // share.expert_ranks
            first = share.expert_rank * each
            module.hold(range(first, first + each))
