"""What an optimizer step does to a whole model, and what is remembered for the next one.

Master weights are float32, moments of the element type of the weights. What a step does to one
weight is in `optimizer.py` of the folder above.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup, all_reduce, broadcast, get_process_group_ranks

from ..config import Config
from ..model import LanguageModel
from ..weights import Index, Published, published
from .waits import Waits


@dataclass
class Shard:
    """What the optimizer knows of a weight, or of the part of it that has a published name.

    `index` is where it lies in the stored weight, () for all of it. `master` is the weight itself
    where that is float32 already.
    """

    name: str
    index: Index
    master: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, tensor: Tensor, name: str = "", index: Index = ()) -> Shard:
        part = tensor.detach()[index]
        master = part if part.dtype == torch.float32 else part.float()
        return cls(name, index, master, torch.zeros_like(part), torch.zeros_like(part))

    def of_part(self, index: Index) -> Shard:
        """Of a published part of the whole weight."""
        return Shard("", index, self.master[index], self.mean[index], self.square[index])


@dataclass
class Weight:
    """A stored weight. `gradient` is float32, and None before the first backward pass of a step.

    A weight that is sharded over a `group` has one shard for each published part that this rank
    updates, and `owners`: the index of each part, and the rank in the group that updates it.
    """

    name: str
    tensor: nn.Parameter
    shards: Sequence[Shard]
    matrix: bool
    group: ProcessGroup | None = None
    owners: Sequence[tuple[Index, int]] = ()
    gradient: Tensor | None = None

    def reduce(self, group: ProcessGroup) -> None:
        """Makes the gradient the sum over all ranks of a group."""
        if self.gradient is None:
            self.gradient = torch.zeros(self.tensor.shape, device=self.tensor.device)
        all_reduce(self.gradient, group=group)


class AdamW:
    """AdamW for all weights of a model. Matrices decay, vectors (norms, biases) do not.

    Gradients of the micro-batches of a step are added up in float32. Weights that are named in
    `groups` are sharded over those ranks, by published parts (ZeRO-1, arXiv 1910.02054): each rank
    has the state of some, updates them, and gets the others from their owners.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: Config,
        groups: Mapping[str, ProcessGroup] | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.settings, self.waits = settings, waits or Waits()
        self.functions = model.optimizer
        groups = groups or {}
        owners = _owners(model, groups)
        parts: dict[int, list[Published]] = {}
        for part in published(model):
            parts.setdefault(id(part.storage), []).append(part)
        self.weights = []
        for name, tensor in model.named_parameters():
            if not tensor.requires_grad:
                continue
            here = parts[id(tensor)]
            matrix = len(here[0].shape) > 1  # not so the biases of all experts, stored as one
            if name not in groups:
                self.weights.append(Weight(name, tensor, [Shard.of(tensor)], matrix))
                continue
            own = groups[name].rank()
            shards = [Shard.of(tensor, p.name, p.index) for p in here if owners[p.name] == own]
            places = [(part.index, owners[part.name]) for part in here]
            self.weights.append(Weight(name, tensor, shards, matrix, groups[name], places))

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
            stored = weight.tensor.detach()
            for shard in weight.shards:
                self.functions.adamw_step(
                    shard.master,
                    weight.gradient[shard.index],
                    shard.mean,
                    shard.square,
                    lr=rate,
                    beta1=one.beta1,
                    beta2=one.beta2,
                    eps=one.eps,
                    weight_decay=one.weight_decay if weight.matrix else 0.0,
                    step=number,
                    factor=factor,
                    weight=stored[shard.index] if stored.dtype != torch.float32 else None,
                )
            # A kernel writes behind autograd's back: FP8 copies must notice.
            increment_version(weight.tensor)
        self.drop_gradients()
        self._exchange()

    def _exchange(self) -> None:
        """Takes the parts of sharded weights from the ranks that have updated them."""
        for group, owner, parts in self._shared:
            flat = torch.cat([part.reshape(-1) for part in parts])
            with self.waits.waiting("new weights", get_process_group_ranks(group)):
                broadcast(flat, group_src=owner, group=group)
            if owner != group.rank():
                sizes = [part.numel() for part in parts]
                for part, new in zip(parts, flat.split(sizes), strict=True):
                    part.copy_(new.view_as(part))

    @cached_property
    def _shared(self) -> list[tuple[ProcessGroup, int, list[Tensor]]]:
        """Each group with one of its ranks, and parts of one dtype that this rank updates.

        In an order that all ranks have, so that none waits for ever: by the ranks of groups.
        """
        found: dict[tuple[tuple[int, ...], int, str], tuple[ProcessGroup, list[Tensor]]] = {}
        for weight in sorted(self.weights, key=lambda w: w.name):
            if weight.group is None:
                continue
            ranks, stored = tuple(get_process_group_ranks(weight.group)), weight.tensor.detach()
            for index, owner in weight.owners:
                key = ranks, owner, str(stored.dtype)
                found.setdefault(key, (weight.group, []))[1].append(stored[index])
        return [(group, key[1], parts) for key, (group, parts) in sorted(
            found.items(), key=lambda one: one[0])]  # fmt: skip

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Makes the weights what their masters are, rounded to their type."""
        for weight in self.weights:
            if weight.tensor.dtype != torch.float32:
                for shard in weight.shards:
                    weight.tensor.detach()[shard.index].copy_(shard.master)

    def kept(self, model: nn.Module) -> Iterator[tuple[Published, Shard | None]]:
        """Every published tensor of which this rank keeps the state, with views of that.

        None for what is not trained by gradients. What is sharded away is not among them.
        """
        known = {id(weight.tensor): weight for weight in self.weights}
        own = {shard.name: shard for weight in self.weights for shard in weight.shards}
        for part in published(model):
            weight = known.get(id(part.storage))
            if weight is None:
                yield part, None
            elif weight.group is None:
                yield part, weight.shards[0].of_part(part.index)
            elif part.name in own:
                yield part, own[part.name]


def _owners(model: nn.Module, groups: Mapping[str, ProcessGroup]) -> dict[str, int]:
    """Which rank of its group updates each part of the weights in `groups`: equal shares."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    parts: dict[ProcessGroup, list[Published]] = {}
    for part in published(model):
        group = groups.get(names.get(id(part.storage), ""))
        if group is not None:
            parts.setdefault(group, []).append(part)
    owners = {}
    for group, members in parts.items():
        loads = [0] * group.size()
        for part in sorted(members, key=lambda p: (-p.tensor.numel(), p.name)):
            owner = loads.index(min(loads))
            owners[part.name] = owner
            loads[owner] += part.tensor.numel()
    return owners
