"""Blocks whose backward pass was derived when they were generated, inside torch's autograd.

A *unit* is what the outermost block calls: a layer, or what stands between layers. Autograd sees
one function for each, hence optimizers, hooks and sharding (`fully_shard`) find what they expect
of a module, while inside of a unit the generated methods `loss` and `backward` do all the work: the
one keeps what the other needs, and nothing else is remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .weights import Block


@dataclass(frozen=True)
class Gradients:
    """Of which results `backward` takes gradients, and of which arguments it gives them."""

    results: tuple[int, ...]
    arguments: tuple[int, ...]


class Kept:
    """What the forward methods of one unit keep for its backward methods, by module.

    Where no gradient will be asked for, `wanted` is false and nothing is kept.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.wanted = wanted
        self._values: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(self, module: nn.Module, *values: Any) -> None:
        """Remembers tensors and numbers of a module until its gradients are computed."""
        if self.wanted:
            self._values[module] = values

    def take(self, module: nn.Module) -> tuple[Any, ...]:
        """What the module kept, in the order in which it did; it is forgotten now."""
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
    ) -> Kept:
        """The inverse of `packed`."""
        kept = cls()
        for module, items in rest:
            kept._values[module] = tuple(
                tensors[item.index] if isinstance(item, _Place) else item for item in items
            )
        return kept


@dataclass(frozen=True)
class _Place:
    index: int


class Grads:
    """Gradients of weights, added up while the methods `backward` run."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._known = {id(weight) for weight in weights}
        self._sums: dict[int, Tensor] = {}

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Adds to the gradient of a weight, in the weight's shape and dtype.

        Raises RuntimeError for a weight that was not there when the loss was computed.
        """
        if id(weight) not in self._known:
            raise RuntimeError(
                "weights of the model were replaced between the loss and its backward pass, as "
                "torch.func.functional_call does: keep them, or build with --skip differentiate"
            )
        gradient = gradient.to(weight.dtype)
        before = self._sums.get(id(weight))
        self._sums[id(weight)] = gradient if before is None else before + gradient

    def of(self, weight: Tensor) -> Tensor | None:
        """The sum so far."""
        return self._sums.get(id(weight))


class Unit(Block, ABC):
    """A block with a derived backward pass, called by the outermost block.

    `forward(.., train=True)` computes what training needs of the block, `forward(..)` what scores
    need; both are calls of the module, so that its hooks run.
    """

    gradients: ClassVar[Gradients]

    @abstractmethod
    def evaluate(self, *inputs: Any) -> Any:
        """The block where no loss is asked for; torch's autograd can follow it."""

    @abstractmethod
    def loss(self, *inputs: Any) -> Any:
        """The block in training; its last argument takes what is to be kept."""

    @abstractmethod
    def backward(self, *gradients: Any) -> Any:
        """Gradients of arguments from those of results; the last two are `Kept` and `Grads`."""

    def forward(self, *inputs: Any, train: bool = False) -> Any:
        if not train:
            return self.evaluate(*inputs)
        return differentiable(
            self.loss, self.backward, self.gradients, tuple(self.parameters()), *inputs
        )


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    gradients: Gradients,
    weights: Sequence[Tensor],
    *inputs: Any,
) -> Any:
    """`forward(*inputs, kept)` as one function of autograd, whose gradients `backward` computes.

    `weights` are the parameters that it uses; those that need a gradient get one. Precision is
    that of the spec, also under `torch.autocast`.
    """
    with _without_autocast(weights):
        if not torch.is_grad_enabled():
            return forward(*inputs, Kept(wanted=False))
        call = _Call(forward, backward, gradients, len(inputs))
        results = _Function.apply(call, *inputs, *weights)
    return results[0] if call.single else tuple(results[i] for i in call.places)


def _without_autocast(weights: Sequence[Tensor]) -> AbstractContextManager[Any]:
    device = weights[0].device.type if weights else "cpu"
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@dataclass
class _Call:
    """One use of a unit. `places[i]` is where result i stands among the distinct ones."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    gradients: Gradients
    inputs: int
    single: bool = False
    places: tuple[int, ...] = ()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        kept = Kept()
        results = call.forward(*tensors[: call.inputs], kept)
        call.single = isinstance(results, Tensor)
        results = (results,) if call.single else results
        # One tensor that is two results is one for autograd, which adds up its gradients.
        distinct = list({id(r): r for r in results}.values())
        order = {id(r): i for i, r in enumerate(distinct)}
        call.places = tuple(order[id(r)] for r in results)
        moving = {call.places[i] for i in call.gradients.results}
        ctx.mark_non_differentiable(*(r for i, r in enumerate(distinct) if i not in moving))
        saved, ctx.rest = kept.packed()
        ctx.weights = tensors[call.inputs :]
        ctx.call = call
        # Weights are read from their modules; they are saved so that autograd notices changes.
        ctx.save_for_backward(*saved, *ctx.weights)
        return tuple(distinct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        kept, grads = Kept.unpacked(ctx.saved_tensors, ctx.rest), Grads(ctx.weights)
        given = [d[call.places[i]] for i in call.gradients.results]
        with _without_autocast(ctx.weights):
            found = call.backward(*given, kept, grads)
        found = (found,) if isinstance(found, Tensor) else found or ()
        inputs: list[Tensor | None] = [None] * call.inputs
        for i, gradient in zip(call.gradients.arguments, found, strict=True):
            inputs[i] = gradient
        return (None, *inputs, *(grads.of(weight) for weight in ctx.weights))
