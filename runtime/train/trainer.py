"""The training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, get_process_group_ranks

from ..graphs import captures
from ..model import LanguageModel, Loss
from ..weights import published
from .balance import Balance, ExpertUtilization
from .captured import CapturedGradients, Gradients, Losses
from .optimizer import AdamW
from .ranks import all_gather_objects
from .sequences import Sequences, count_labels, inputs_and_labels, positions
from .settings import Settings, TrainError
from .waits import Waits


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step. Losses are means over its tokens, in nats; norms are before clipping."""

    number: int
    tokens: int
    """Tokens trained on so far, including this step."""
    batch: int
    total: float
    main: float
    mtp: tuple[float, ...]
    balance: float
    learning_rate: float
    bias_update: float
    gradient_norm: float
    experts: dict[str, ExpertUtilization]


class NotFinite(TrainError):
    """A step whose loss or gradients are NaN or infinite. It has changed nothing."""


@dataclass
class Position:
    """How far training is: it determines the data of the next step."""

    steps: int = 0
    sequences: int = 0


@dataclass
class Trainer:
    """Trains a model on sequences; every rank of `group` has one, and they stay equal.

    The sequences of a step do not depend on the number of ranks: they are dealt out one by one.
    Without a group there is one rank.
    """

    model: LanguageModel
    settings: Settings
    sequences: Sequences
    group: ProcessGroup | None = None
    position: Position = field(default_factory=Position)
    holders: Mapping[str, ProcessGroup] | None = None
    """The ranks that hold a weight, by stored name; None: `group` holds all of them."""
    sharded: bool = False
    """Whether the optimizer's state of a weight is sharded over its holders."""
    waits: Waits = field(default_factory=Waits)

    def __post_init__(self) -> None:
        self.rank = self.group.rank() if self.group else 0
        self.ranks = self.group.size() if self.group else 1
        holders = self.holders
        if holders is None and self.group is not None:
            holders = dict.fromkeys(dict(self.model.named_parameters()), self.group)
        one = self.settings.optimizer
        self.optimizer = AdamW(self.model, one, holders, self.sharded, self.waits)
        self.balance = Balance(self.model)
        self._add_gradients: Gradients = self._micro_batch
        if captures(self.model):
            self._add_gradients = CapturedGradients(self._micro_batch, self.model, self.optimizer)
        self.average = None
        if self.settings.ema:
            self.average = Average(self.model, self.optimizer, self.settings.ema)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, of all ranks."""
        return self.position.sequences * self.settings.sequence_length

    @property
    def ended(self) -> bool:
        return self.settings.fraction_done(self.tokens, self.position.steps) >= 1

    def step(self) -> StepMetrics:
        """Trains on one batch.

        Raises NotFinite, with the state as it was before, for a loss or gradients that are NaN or
        infinite; TrainError for a batch with fewer sequences than there are ranks.
        """
        settings, steps, before = self.settings, self.position.steps, self.tokens
        batch = self._batch_at(before, steps)
        if batch < self.ranks:
            raise TrainError(f"a batch of {batch} sequences is too small for {self.ranks} ranks")
        sums = self._gradients(batch, before)
        self._reduce(sums)
        losses = [float(x) for x in sums]
        squares = self._squares()
        norm = float(squares.sqrt())
        if not torch.tensor([*losses, norm]).isfinite().all():
            self._refuse(losses, norm, batch)
        after = before + batch * settings.sequence_length
        rate = settings.learning_rate.value_at(after, steps + 1)
        speed = settings.bias_update.value_at(before, steps)
        self.optimizer.step(steps + 1, rate, squares)
        experts = self._finish_balance(speed)
        if self.average is not None:
            self.average.update()
        self.position = Position(steps + 1, self.position.sequences + batch)
        total, main, balance, *mtp = losses
        return StepMetrics(
            steps + 1, after, batch, total, main, tuple(mtp), balance, rate, speed, norm, experts
        )

    def _batch_at(self, tokens: int, steps: int) -> int:
        """Sequences of the step that follows so many tokens and steps."""
        return self.settings.batch_at(tokens, steps)

    def _reduce(self, sums: Tensor) -> None:
        """Sums losses, gradients and loads over the ranks."""
        if self.group is not None:
            with self.waits.waiting("the sums of losses", get_process_group_ranks(self.group)):
                all_reduce(sums, group=self.group)
                self.balance.reduce(self.group)
        self.optimizer.reduce()

    def _squares(self) -> Tensor:
        """The square of the norm of all gradients."""
        own = self.optimizer.squares()
        if self.group is None:
            return own
        # Of ranks without weights of their own, too; in float64, so that their order is nothing.
        squares = own.to(self.model.device, torch.float64)
        with self.waits.waiting("the norm of gradients", get_process_group_ranks(self.group)):
            all_reduce(squares, group=self.group)
        return squares.float()

    def _finish_balance(self, speed: float) -> dict[str, ExpertUtilization]:
        return self.balance.finish(speed)

    def _gradients(self, batch: int, tokens_seen: int) -> Tensor:
        """Accumulates the gradients of this rank's sequences; returns the sums of the losses.

        A mean over micro-batches is one over the labels of the step: each counts by its labels.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.model.device)
        labels = self._labels(batch)
        for tokens in self._micro_batches(batch):
            # Without masks every sequence has equally many labels: no device is asked for them.
            part = count_labels(tokens) / labels if labels else len(tokens) / batch
            share = sums.new_full((), part)
            losses, load = self._add_gradients(tokens, share, tokens_seen)
            self.balance.add(load)
            losses *= share
            sums = losses if len(sums) != len(losses) else sums + losses
        return sums

    def _micro_batch(self, tokens: Tensor, share: Tensor, tokens_seen: int) -> Losses:
        """Adds the gradients of a micro-batch, times its share; waits for nothing on a GPU."""
        loss = loss_of(self.model, tokens, tokens_seen)
        loss.total.backward(share.to(loss.total.dtype))
        self.optimizer.collect()
        return losses_of(loss), loss.load

    def _labels(self, batch: int) -> int:
        """Of all sequences of a step, those of other ranks included; 0 where none is masked."""
        if not self.sequences.masked:
            return 0
        first = self.position.sequences
        indices = range(first, first + batch)
        return max(1, sum(count_labels(self.sequences[i][None]) for i in indices))

    def _micro_batches(self, batch: int) -> list[Tensor]:
        first = self.position.sequences
        mine = range(first + self.rank, first + batch, self.ranks)
        size = self.settings.micro_batch or max(1, len(mine))
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        return [self.sequences.batch(part).to(self.model.device) for part in parts]

    def _drop_loads(self) -> None:
        self.balance.load = None

    def _refuse(self, losses: list[float], norm: float, batch: int) -> None:
        """Raises NotFinite, naming the first module that gave NaN or infinity."""
        parts = all_gather_objects(self.group, self.optimizer.not_finite())
        names = list(dict.fromkeys(name for part in parts for name in part))
        self.optimizer.drop_gradients()
        self._drop_loads()
        found = all_gather_objects(self.group, self._first_not_finite(batch))
        where = next((text for text in found if text is not None), None)
        if where is None and not math.isfinite(losses[0]):
            where = "the head's scores, or their loss: all layers are finite"
        elif where is None:
            where = f"the gradients of {', '.join(names[:3])}" if names else "the sum of gradients"
        raise NotFinite(
            f"step {self.position.steps + 1}: the loss is {losses[0]:.4g}, the norm of gradients "
            f"{norm:.4g}; first not finite is {where}"
        )

    @torch.no_grad()
    def _first_not_finite(self, batch: int) -> str | None:
        found: list[str] = []

        def watch(name: str, kind: str, outputs: object) -> None:
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            real = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not all(t.isfinite().all() for t in real):
                found.append(f"what {name} ({kind}) gives")

        bad = [p.name for p in published(self.model) if not p.tensor.isfinite().all()]
        hooks = [
            module.register_forward_hook(
                lambda m, _, out, name=name: watch(name, type(m).__name__, out)
            )
            for name, module in self.model.named_modules()
        ]
        try:
            for tokens in self._micro_batches(batch):
                self._forward(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if bad:  # only now, for ranks may have to compute together
            return f"the weight {bad[0]}"
        return found[0] if found else None

    def _forward(self, tokens: Tensor) -> None:
        """Computes the loss of a micro-batch, so that hooks see what modules give."""
        loss_of(self.model, tokens, self.tokens)


def loss_of(model: LanguageModel, tokens: Tensor, tokens_seen: int = 0) -> Loss:
    """The loss of packed sequences and the token after each, int64 [batch, seq + 1], in which
    tokens that are not trained on are complements."""
    inputs, labels = inputs_and_labels(tokens)
    return model.loss(inputs, labels, positions(inputs, model.config), tokens_seen)


def losses_of(loss: Loss) -> Tensor:
    """float64 [3 + depths]: total, main, balance, and of each depth of MTP."""
    return torch.stack(
        [t.detach().double() for t in (loss.total, loss.main, loss.balance, *loss.mtp)]
    )


class Average:
    """A moving average of all weights and biases in float32, on the CPU (report, section 3.2.3).

    `values` by published name; of sharded weights the elements that this rank updates.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, decay: float) -> None:
        self.decay = decay
        self._followed = {
            part.name: part.tensor.view(-1) if shard is None else shard.master
            for part, shard in optimizer.kept(model)
        }
        self.values = {name: now.float().cpu().clone() for name, now in self._followed.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, now in self._followed.items():
            value = self.values[name]
            value.lerp_(now.to(value.device, value.dtype), 1 - self.decay)
