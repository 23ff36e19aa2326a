"""What a generated forward pass saves for its backward pass, and gradients that are added up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gradients:
    """Of which results `backward` takes gradients, and of which arguments it gives them."""

    results: tuple[int, ...]
    arguments: tuple[int, ...]


class Saved:
    """The saved activations of one unit, by module.

    Where no gradient will be asked for, `wanted` is false and nothing is saved.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self._values: dict[nn.Module, tuple[Any, ...]] = {}

    def save(self, module: nn.Module, *values: Any) -> None:
        """Holds tensors and numbers of a module until its gradients are computed."""
        if self.wanted:
            self._values[module] = values

    def pop(self, module: nn.Module) -> tuple[Any, ...]:
        """What the module saved, in the order of its call of `save`, which is then forgotten."""
        return self._values.pop(module)

    def packed(self) -> tuple[list[Tensor], list[tuple[nn.Module, list[Any]]]]:
        """All tensors in a row, and the rest with the places of the tensors in that row."""
        tensors: list[Tensor] = []
        rest = []
        for module, values in self._values.items():
            items: list[Any] = []
            for value in values:
                if isinstance(value, Tensor):
                    items.append(_Place(len(tensors)))
                    tensors.append(value)
                else:
                    items.append(value)
            rest.append((module, items))
        return tensors, rest

    @classmethod
    def unpacked(
        cls, tensors: Sequence[Tensor], rest: Sequence[tuple[nn.Module, Sequence[Any]]]
    ) -> Saved:
        """The inverse of `packed`."""
        saved = cls()
        for module, items in rest:
            saved._values[module] = tuple(
                tensors[item.index] if isinstance(item, _Place) else item for item in items
            )
        return saved


@dataclass(frozen=True)
class _Place:
    index: int


def without_autocast(weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """In which what weights are multiplied with is computed in the precision of the spec."""
    device = weights[0].device.type if weights else "cpu"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class Deferred:
    """Products that are gradients of weights, until they are computed: the W of a schedule."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def add(self, weight: Tensor, product: Callable[[], Tensor]) -> None:
        self._waiting.append((weight, product))

    def drop(self) -> None:
        """Forgets what was not computed: their chunk has failed."""
        self._waiting.clear()

    @torch.no_grad()
    def compute(self) -> None:
        """Adds all of them to `weight.grad`, as autograd does, in the order in which they came."""
        while self._waiting:
            weight, product = self._waiting.popleft()
            with without_autocast([weight]):
                gradient = product().to(weight.dtype)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


class Grads:
    """Gradients of weights, added up while the methods `backward` run.

    Those that may wait are added to `deferred`, if it is given.
    """

    def __init__(self, weights: Sequence[Tensor], deferred: Deferred | None = None) -> None:
        self._known = {id(weight) for weight in weights}
        self._sums: dict[int, Tensor] = {}
        self._deferred = deferred

    def defer(
        self, weight: Tensor, product: Callable[..., Tensor], *operands: Any, **options: Any
    ) -> None:
        """Adds a product to the gradient of a weight, now or later. Raises as `add` does."""
        if self._deferred is None:
            self.add(weight, product(*operands, **options))
            return
        self._check(weight)
        self._deferred.add(weight, partial(product, *operands, **options))

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of a weight, in the weight's shape and dtype.

        Raises RuntimeError for a weight that was not there when the loss was computed.
        """
        self._check(weight)
        gradient = gradient.to(weight.dtype)
        before = self._sums.get(id(weight))
        self._sums[id(weight)] = gradient if before is None else before + gradient

    def _check(self, weight: Tensor) -> None:
        if id(weight) not in self._known:
            raise RuntimeError(
                "weights of the model were replaced between the loss and its backward pass, as "
                "torch.func.functional_call does: keep them, or build with --skip differentiate"
            )

    def of(self, weight: Tensor) -> Tensor | None:
        """The sum so far."""
        return self._sums.get(id(weight))
