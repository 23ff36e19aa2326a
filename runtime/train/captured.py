"""Micro-batches as CUDA graphs: the loss and its gradients, for each shape of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config, Schedule
from ..graphs import Graphs
from ..model import LanguageModel
from ..weights import Tensors
from .optimizer import AdamW

Losses = tuple[Tensor, tuple[Tensor, ...]]
"""Losses and loads of a micro-batch."""

Gradients = Callable[[Tensor, Tensor, int], Losses]
"""Adds the gradients of tokens [batch, seq + 1], times their share (float64) of a step, to those of
the step; the last operand is the number of tokens seen before."""


class CapturedGradients:
    """`gradients` for micro-batches of a model on a GPU, captured.

    Gradients are added up inside of a graph, in memory that stays. A graph has the values of
    schedules fixed: a step that has others than the step before is launched from Python. Hooks of
    modules run when a graph is captured, and not when it is replayed.
    """

    def __init__(self, gradients: Gradients, model: LanguageModel, optimizer: AdamW) -> None:
        self.gradients, self.optimizer = gradients, optimizer
        self.graphs = Graphs(f"a training step of {type(model).__module__}", model.device)
        self._losses: Config = model.config.train.loss
        self._values: tuple[float, ...] = ()
        self._since = -1
        """Tokens that were seen before the step that first had these values."""
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._inputs: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._copied = [one for one in model.modules() if isinstance(one, Tensors) and one.has_fp8]
        for module in self._copied:
            module.keeps_copy = True

    def __call__(self, tokens: Tensor, share: Tensor, tokens_seen: int) -> Losses:
        values = tuple(_scheduled(self._losses, tokens_seen))
        if values != self._values:
            self._values, self._since = values, tokens_seen
        if not self.graphs.usable or tokens_seen == self._since:
            return self.gradients(tokens, share, tokens_seen)
        with torch.no_grad():
            copies = [part for module in self._copied for part in module.fp8]  # of weights of now
        places = map(Tensor.data_ptr, (*self._tensors, *copies))
        self.graphs.depend_on((values, *places))
        if tokens.shape not in self._inputs:
            self._inputs[tokens.shape] = torch.empty_like(tokens), torch.empty_like(share)
        inputs = self._inputs[tokens.shape]
        for ours, given in zip(inputs, (tokens, share), strict=True):
            ours.copy_(given)
        self.optimizer.settle()
        losses, loads = self.graphs.run(tokens.shape, partial(self.gradients, *inputs, tokens_seen))
        self.optimizer.settle()  # what the first calls have made
        return losses.clone(), tuple(load.clone() for load in loads)


def _scheduled(values: Any, tokens: int) -> Iterator[float]:
    """What all schedules among some values are after so many tokens."""
    if isinstance(values, Schedule):
        yield values.value_at(tokens)
    elif isinstance(values, Config):
        for name in values:
            yield from _scheduled(values[name], tokens)
