"""What training is at one moment: tensors, and numbers. Restored, it goes on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..weights import published
from .trainer import Position, Trainer

MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"


@dataclass(frozen=True)
class State:
    """`tensors` by folder (MODEL, ..) and published name; `values` are plain, for JSON."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    def copied(self) -> State:
        """The same on the CPU, of which training changes nothing any more."""
        tensors = {
            folder: {name: t.detach().to("cpu", copy=True) for name, t in group.items()}
            for folder, group in self.tensors.items()
        }
        return State(tensors, self.values)


def state(trainer: Trainer) -> State:
    """The state of a trainer, as views: whoever writes to them changes it.

    `model` holds master weights and routing biases, and can be loaded as a model.
    """
    moments: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    for name, master, mean, square in trainer.optimizer.state(trainer.model):
        masters[name] = master
        moments[f"{name}.mean"], moments[f"{name}.square"] = mean, square
    weights = {part.name: masters.get(part.name, part.tensor) for part in published(trainer.model)}
    tensors = {MODEL: weights, OPTIMIZER: moments}
    if trainer.average is not None:
        tensors[AVERAGE] = trainer.average.state()
    return State(tensors, _values(trainer))


def _values(trainer: Trainer) -> dict[str, Any]:
    position = trainer.position
    return {
        "steps": position.steps,
        "sequences": position.sequences,
        "tokens": trainer.tokens,
        # Nothing in a model draws numbers today; a block that does goes on as it would have.
        "random": bytes(torch.get_rng_state().tolist()).hex(),
    }


def restored(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Takes up the numbers of a state whose tensors were written to the views of `state`."""
    trainer.position = Position(values["steps"], values["sequences"])
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(values["random"])), dtype=torch.uint8))
    trainer.optimizer.copy_masters()
