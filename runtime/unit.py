"""Blocks whose backward pass was derived when they were generated, inside torch's autograd.

A *unit* is what the outermost block calls: a layer, or what lies between layers. Autograd sees
one function for each, hence optimizers, hooks and sharding (`fully_shard`) find what they expect
of a module, while inside of a unit the generated methods `compute` and `backward` do all the work:
the one saves what the other needs, and nothing else is remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .saved import Deferred, Gradients, Grads, Saved, without_autocast
from .weights import Block


class Unit(Block, ABC):
    """A block with a derived backward pass, called by the outermost block.

    `forward(.., train=True)` computes what training needs of the block, `forward(..)` what scores
    need; both are calls of the module, so that its hooks run.
    """

    gradients: ClassVar[Gradients]

    @abstractmethod
    def compute(self, *inputs: Any) -> Any:
        """The block; given a last argument `Saved`, for training: with all results, and saving."""

    @abstractmethod
    def backward(self, *gradients: Any) -> Any:
        """Gradients of arguments from those of results; the last two are `Saved` and `Grads`."""

    def forward(self, *inputs: Any, train: bool = False) -> Any:
        if not train:
            return self.compute(*inputs)
        return differentiable(
            self.compute, self.backward, self.gradients, tuple(self.parameters()), *inputs
        )


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    gradients: Gradients,
    weights: Sequence[Tensor],
    *inputs: Any,
) -> Any:
    """`forward(*inputs, saved)` as one function of autograd, whose gradients `backward` computes.

    `weights` are the parameters that it uses; those that need a gradient get one. Precision is
    that of the spec, also under `torch.autocast`.
    """
    with without_autocast(weights):
        if not torch.is_grad_enabled():
            return forward(*inputs, Saved(wanted=False))
        call = _Call(forward, backward, gradients, len(inputs))
        results = _Function.apply(call, *inputs, *weights)
    return results[0] if call.single else tuple(results[i] for i in call.places)


_deferred: Deferred | None = None


@contextmanager
def deferring(products: Deferred | None) -> Iterator[None]:
    """Backward passes leave products that are gradients of weights there; None: they compute them.

    In all threads, for autograd has its own.
    """
    global _deferred
    before, _deferred = _deferred, products
    try:
        yield
    finally:
        _deferred = before


@dataclass
class _Call:
    """One use of a unit. `places[i]` is the index of result i among the distinct ones."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    gradients: Gradients
    inputs: int
    single: bool = False
    places: tuple[int, ...] = ()


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        saved = Saved()
        results = call.forward(*tensors[: call.inputs], saved)
        call.single = isinstance(results, Tensor)
        results = (results,) if call.single else results
        # One tensor that is two results is one for autograd, which adds up its gradients.
        distinct = list({id(r): r for r in results}.values())
        order = {id(r): i for i, r in enumerate(distinct)}
        call.places = tuple(order[id(r)] for r in results)
        moving = {call.places[i] for i in call.gradients.results}
        ctx.mark_non_differentiable(*(r for i, r in enumerate(distinct) if i not in moving))
        saved_tensors, ctx.rest = saved.packed()
        ctx.weights = tensors[call.inputs :]
        ctx.call = call
        # Weights are read from their modules; they are saved so that autograd notices changes.
        ctx.save_for_backward(*saved_tensors, *ctx.weights)
        return tuple(distinct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        saved, grads = Saved.unpacked(ctx.saved_tensors, ctx.rest), Grads(ctx.weights, _deferred)
        given = [d[call.places[i]] for i in call.gradients.results]
        with without_autocast(ctx.weights):
            found = call.backward(*given, saved, grads)
        found = (found,) if isinstance(found, Tensor) else found or ()
        inputs: list[Tensor | None] = [None] * call.inputs
        for i, gradient in zip(call.gradients.arguments, found, strict=True):
            inputs[i] = gradient
        return (None, *inputs, *(grads.of(weight) for weight in ctx.weights))
