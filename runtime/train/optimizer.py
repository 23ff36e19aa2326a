"""What an optimizer step does to a whole model, and what is remembered for the next one.

Master weights are float32, moments of the element type of the weights. What a step does to one
weight is in `optimizer.py` of the folder above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup, get_process_group_ranks

from ..config import Config
from ..model import LanguageModel
from ..weights import Published, published
from .buckets import Bucket
from .waits import Waits


@dataclass
class Shard:
    """What the optimizer knows of the elements of a tensor from `start` on, in their order.

    All are [n]. `master` is the weight itself where that is float32 already.
    """

    start: int
    master: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> Shard:
        """Of weights [n], with moments of 0."""
        master = weights if weights.dtype == torch.float32 else weights.float()
        return cls(0, master, torch.zeros_like(weights), torch.zeros_like(weights))

    @property
    def stop(self) -> int:
        return self.start + len(self.master)

    def part(self, start: int, stop: int) -> Shard | None:
        """What is known of some elements, as a tensor of its own; None where that is nothing."""
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        here = slice(first - self.start, last - self.start)
        return Shard(first - start, self.master[here], self.mean[here], self.square[here])


@dataclass
class TrainedWeight:
    """A stored weight. `gradient` is float32, and None before the first backward pass of a step.

    `shard` is None where other ranks update all of it; a weight that only this rank holds is in no
    bucket.
    """

    name: str
    tensor: nn.Parameter
    shard: Shard | None
    matrix: bool
    bucket: Bucket | None = None
    gradient: Tensor | None = None
    place: Tensor | None = None
    """Where CUDA graphs have the gradient, if they do."""

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of a micro-batch."""
        if self.gradient is not None:
            self.gradient += gradient.float()
        elif self.bucket is None:
            self.gradient = gradient.float()
        else:
            self.gradient = self.bucket.gradient(self.name, self.tensor).copy_(gradient)

    def settle(self) -> None:
        """From the first gradient on it is in the same memory at each step, and zero at first."""
        if self.place is None:
            self.place = self.gradient
        elif self.gradient is None:
            self.gradient = self.place.zero_()
        elif self.gradient is not self.place:
            self.gradient = self.place.copy_(self.gradient)


def _decays(part: Published) -> bool:
    """Whether a tensor is a matrix by its role, too: a scale of each head [heads, 1] is none."""
    return len(part.shape) > 1 and (part.declaration is None or part.declaration.decay)


class AdamW:
    """AdamW for all weights of a model. Matrices decay; norms, biases and learned scales do not.

    Gradients of the micro-batches of a step are added up in float32. `groups` are the ranks that
    hold a weight, by its stored name, for those that other ranks hold, too. If they are `sharded`,
    each rank has the state of a slice and updates that, and gets the others (ZeRO-1).
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: Config,
        groups: Mapping[str, ProcessGroup] | None = None,
        sharded: bool = False,
        waits: Waits | None = None,
    ) -> None:
        self.settings, self.sharded = settings, sharded
        self.functions = model.optimizer
        trained = {n: tensor for n, tensor in model.named_parameters() if tensor.requires_grad}
        self.buckets = _buckets(trained, groups or {}, waits or Waits())
        places: dict[str, tuple[Bucket, Shard | None]] = {}
        for bucket in self.buckets:
            state = Shard.of(bucket.flat[bucket.own] if sharded else bucket.flat)
            state.start = bucket.own.start if sharded else 0
            for name, place in bucket.places.items():
                places[name] = bucket, state.part(place.start, place.stop)
        self.weights = []
        # Of published tensors: the biases of all experts, stored as one, are no matrix.
        decaying = {id(part.storage): _decays(part) for part in published(model)}
        for name, tensor in trained.items():
            matrix = decaying[id(tensor)]
            if name in places:
                bucket, shard = places[name]
                self.weights.append(TrainedWeight(name, tensor, shard, matrix, bucket))
            else:
                whole = Shard.of(tensor.detach().view(-1))
                self.weights.append(TrainedWeight(name, tensor, whole, matrix))

    def collect(self) -> None:
        """Adds the gradients of a backward pass to those of the step."""
        for weight in self.weights:
            if weight.tensor.grad is not None:
                weight.add(weight.tensor.grad)
                weight.tensor.grad = None

    def settle(self) -> None:
        """Keeps all gradients where they are, for CUDA graphs that add to them."""
        for weight in self.weights:
            weight.settle()

    def reduce(self) -> None:
        """Makes the gradients that this rank updates the sums over all that hold the weights."""
        for weight in self.weights:
            if weight.bucket is not None and weight.gradient is None:
                weight.gradient = weight.bucket.gradient(weight.name, weight.tensor).zero_()
        for bucket in self.buckets:
            bucket.reduce(whole=not self.sharded)

    def squares(self) -> Tensor:
        """The squares of gradients added up, of each element on one of the ranks that hold it.

        Those of all ranks are the square of the norm; not finite if one gradient is not.
        """
        found = [w.gradient for w in self.weights if w.bucket is None and w.gradient is not None]
        found += [bucket.squares() for bucket in self.buckets]
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
            shard, stored = weight.shard, weight.tensor.detach()
            if weight.gradient is None or shard is None:
                continue
            here = slice(shard.start, shard.stop)
            self.functions.adamw_step(
                shard.master,
                weight.gradient.view(-1)[here],
                shard.mean,
                shard.square,
                lr=rate,
                beta1=one.beta1,
                beta2=one.beta2,
                eps=one.eps,
                weight_decay=one.weight_decay if weight.matrix else 0.0,
                step=number,
                factor=factor,
                weight=stored.view(-1)[here] if stored.dtype != torch.float32 else None,
            )
        self.drop_gradients()
        self.gather()

    def gather(self) -> None:
        """Takes what other ranks have of the weights; all ranks call it together."""
        for bucket in self.buckets if self.sharded else ():
            bucket.gather()
        # Kernels and buckets write behind autograd's back: FP8 copies must notice.
        for weight in self.weights:
            increment_version(weight.tensor)

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Makes the weights that this rank updates what their masters are, rounded."""
        for weight in self.weights:
            if weight.shard is not None and weight.tensor.dtype != torch.float32:
                here = slice(weight.shard.start, weight.shard.stop)
                weight.tensor.detach().view(-1)[here].copy_(weight.shard.master)

    def kept(self, model: nn.Module) -> Iterator[tuple[Published, Shard | None]]:
        """Every published tensor of which this rank keeps state, with views of that.

        None for what is not trained by gradients. What only others update is not among them.
        """
        known = {id(weight.tensor): weight for weight in self.weights}
        for part in published(model):
            weight = known.get(id(part.storage))
            if weight is None:
                yield part, None
            elif weight.shard is not None:
                view = part.tensor  # contiguous: an expert, or some rows
                first = int(view.storage_offset() - weight.tensor.storage_offset())
                shard = weight.shard.part(first, first + view.numel())
                if shard is not None:
                    yield part, shard


def _buckets(
    weights: Mapping[str, nn.Parameter], groups: Mapping[str, ProcessGroup], waits: Waits
) -> list[Bucket]:
    """One for each group and element type, in an order that all ranks have: by ranks of groups."""
    found: dict[tuple[tuple[int, ...], str], tuple[ProcessGroup, dict[str, nn.Parameter]]] = {}
    for name, weight in weights.items():
        if name in groups:
            key = tuple(get_process_group_ranks(groups[name])), str(weight.dtype)
            found.setdefault(key, (groups[name], {}))[1][name] = weight
    return [Bucket(members, group, waits) for _, (group, members) in sorted(
        found.items(), key=lambda one: one[0])]  # fmt: skip
