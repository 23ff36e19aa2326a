"""What an optimizer step does to a whole model, and what is remembered for the next one.

Master weights are float32, moments of the element type of the weights. What a step does to one
weight is in `optimizer.py` of the folder above.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup, all_reduce

from ..config import Config
from ..model import LanguageModel
from ..weights import published


@dataclass
class Weight:
    """A stored weight with what the optimizer knows of it; `master` is the weight if that is
    float32 already. `gradient` is float32, and None before the first backward pass of a step."""

    name: str
    tensor: nn.Parameter
    master: Tensor
    mean: Tensor
    square: Tensor
    gradient: Tensor | None = None

    def reduce(self, group: ProcessGroup) -> None:
        """Makes the gradient the sum over all ranks of a group."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.master)
        all_reduce(self.gradient, group=group)


class AdamW:
    """AdamW for all weights of a model. Matrices decay, vectors (norms) do not.

    Gradients of the micro-batches of a step are added up in float32.
    """

    def __init__(self, model: LanguageModel, settings: Config) -> None:
        self.settings = settings
        self.functions = model.optimizer
        self.weights = [
            Weight(
                name,
                tensor,
                tensor.detach() if tensor.dtype == torch.float32 else tensor.detach().float(),
                torch.zeros_like(tensor, requires_grad=False),
                torch.zeros_like(tensor, requires_grad=False),
            )
            for name, tensor in model.named_parameters()
            if tensor.requires_grad
        ]

    def collect(self) -> None:
        """Adds the gradients of a backward pass to those of the step."""
        for weight in self.weights:
            if weight.tensor.grad is None:
                continue
            gradient = weight.tensor.grad.float()
            before = weight.gradient
            weight.gradient = gradient if before is None else before.add_(gradient)
            weight.tensor.grad = None

    def reduce(self, group: ProcessGroup) -> None:
        """Makes the gradients the sums over all ranks."""
        for weight in self.weights:
            weight.reduce(group)

    def squares(self, counted: Collection[str] | None = None) -> Tensor:
        """The square of the norm of all gradients together; not finite if one of them is not.

        With `counted`, of the gradients of those weights.
        """
        weights = (w for w in self.weights if counted is None or w.name in counted)
        found = [w.gradient for w in weights if w.gradient is not None]
        squares: Tensor = self.functions.square_sum(found)
        return squares

    def not_finite(self) -> list[str]:
        """Names of the weights whose gradients hold NaN or infinity."""
        return [
            weight.name
            for weight in self.weights
            if weight.gradient is not None and not weight.gradient.isfinite().all()
        ]

    def drop_gradients(self) -> None:
        for weight in self.weights:
            weight.gradient = weight.tensor.grad = None

    @torch.no_grad()
    def step(self, number: int, rate: float, squares: Tensor) -> None:
        """The `number`-th step, counted from 1, at a learning rate; then gradients are dropped."""
        one = self.settings
        factor = self.functions.clip_factor(squares, one.clip) if one.clip else None
        for weight in self.weights:
            if weight.gradient is None:
                continue
            self.functions.adamw_step(
                weight.master,
                weight.gradient,
                weight.mean,
                weight.square,
                lr=rate,
                beta1=one.beta1,
                beta2=one.beta2,
                eps=one.eps,
                weight_decay=one.weight_decay if weight.tensor.dim() > 1 else 0.0,
                step=number,
                factor=factor,
                weight=weight.tensor if weight.tensor.dtype != torch.float32 else None,
            )
            # A kernel writes behind autograd's back: FP8 copies must notice.
            increment_version(weight.tensor)
        self.drop_gradients()

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Makes the weights what their masters are, rounded to their type."""
        for weight in self.weights:
            if weight.tensor.dtype != torch.float32:
                weight.tensor.copy_(weight.master)

    def state(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(published name, master, mean, square): views of all that is to be remembered."""
        known = {id(weight.tensor): weight for weight in self.weights}
        for part in published(model):
            weight = known.get(id(part.storage))
            if weight is not None:
                index = part.index
                yield part.name, weight.master[index], weight.mean[index], weight.square[index]
