"""The state of training: tensors and numbers, from which it resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import matched
from ..shards import LoadError
from ..weights import published
from .device import random_state, set_random_state
from .settings import TrainError
from .trainer import Position, Trainer

MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"


@dataclass(frozen=True)
class State:
    """`tensors` by folder (MODEL, ..) and published name; `values` are plain, for JSON."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    def copied(self) -> State:
        """A copy on the CPU, which further training does not change."""
        tensors = {
            folder: {name: t.detach().to("cpu", copy=True) for name, t in group.items()}
            for folder, group in self.tensors.items()
        }
        return State(tensors, self.values)


def training_state(trainer: Trainer, whole: bool = False) -> State:
    """The state of a trainer, as views: writing to them changes it.

    `model` holds master weights and routing biases, and can be loaded as a model. Of what is
    sharded over ranks it is the part of this one; with `whole` also the weights that others
    update, to be read into.
    """
    moments: dict[str, Tensor] = {}
    weights = {part.name: part.tensor for part in published(trainer.model)} if whole else {}
    for part, shard in trainer.optimizer.kept(trainer.model):
        weights[part.name] = part.tensor if shard is None else shard.master
        if shard is not None:
            moments[f"{part.name}.mean"], moments[f"{part.name}.square"] = shard.mean, shard.square
    tensors = {MODEL: weights, OPTIMIZER: moments}
    if trainer.average is not None:
        tensors[AVERAGE] = trainer.average.values
    return State(tensors, _values(trainer))


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Starts from the weights and biases of a folder of safetensors, masters and average included.

    They are not rounded on the way to a master. Raises TrainError, with nothing changed, for
    tensors that are missing, left over, or of the wrong shape or type.
    """
    tensors = training_state(trainer, whole=True).tensors
    # The folder has the whole model, of which a rank may hold a part.
    shapes = {part.name: part.shape for part in published(trainer.model.whole)}
    try:
        with matched(folder, shapes, trainer.model.aliases) as (shards, sources):
            for name, view in tensors[MODEL].items():
                view.copy_(sources.of[name].read(shards))
    except LoadError as error:
        raise TrainError(str(error)) from None
    trainer.optimizer.copy_masters()
    for name, view in tensors.get(AVERAGE, {}).items():
        view.copy_(tensors[MODEL][name])


def _values(trainer: Trainer) -> dict[str, Any]:
    position = trainer.position
    return {
        "steps": position.steps,
        "sequences": position.sequences,
        "tokens": trainer.tokens,
        # No block uses random numbers today; one that does resumes with the same ones.
        **random_state(trainer.model.device),
    }


def restore(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Restores the numbers of a state, after its tensors were written to `training_state`."""
    trainer.position = Position(values["steps"], values["sequences"])
    set_random_state(trainer.model.device, values)
    trainer.optimizer.copy_masters()
