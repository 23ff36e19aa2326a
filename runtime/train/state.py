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
from .pieces import Piece, take, values_of
from .settings import TrainError
from .trainer import Position, Trainer

MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "ema"


@dataclass(frozen=True)
class State:
    """`tensors` by folder (MODEL, ..) and published name; `values` are plain, for JSON."""

    tensors: Mapping[str, Mapping[str, Tensor | Piece]]
    values: Mapping[str, Any]

    def copied(self) -> State:
        """A copy on the CPU, which further training does not change."""
        tensors = {
            folder: {name: _copied(one) for name, one in group.items()}
            for folder, group in self.tensors.items()
        }
        return State(tensors, self.values)


def _copied(one: Tensor | Piece) -> Tensor | Piece:
    if isinstance(one, Piece):
        return Piece(one.values.detach().to("cpu", copy=True), one.shape, one.start)
    return one.detach().to("cpu", copy=True)


def training_state(trainer: Trainer) -> State:
    """The state of a trainer, as views: writing to them changes it.

    `model` holds master weights and routing biases, and can be loaded as a model. Of what is
    sharded over ranks it is the part of this one, the first and last of which may be pieces.
    """
    tensors: dict[str, dict[str, Tensor | Piece]] = {MODEL: {}, OPTIMIZER: {}}
    average = None if trainer.average is None else trainer.average.values
    if average is not None:
        tensors[AVERAGE] = {}
    for part, shard in trainer.optimizer.kept(trainer.model):
        name, start = part.name, 0 if shard is None else shard.start
        found = {(MODEL, name): part.tensor.view(-1) if shard is None else shard.master}
        if shard is not None:
            found[OPTIMIZER, f"{name}.mean"] = shard.mean
            found[OPTIMIZER, f"{name}.square"] = shard.square
        if average is not None:
            found[AVERAGE, name] = average[name]
        for (folder, key), values in found.items():
            tensors[folder][key] = Piece.of(values, part.shape, start)
    return State(tensors, _values(trainer))


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Starts from the weights and biases of a folder of safetensors, masters and average included.

    They are not rounded on the way to a master. Raises TrainError, with nothing changed, for
    tensors that are missing, left over, or of the wrong shape or type. Then `AdamW.gather`.
    """
    tensors = training_state(trainer).tensors
    # The folder has the whole model, of which a rank may hold a part.
    shapes = {part.name: part.shape for part in published(trainer.model.whole)}
    try:
        with matched(folder, shapes, trainer.model.aliases) as (shards, sources):
            for name, view in tensors[MODEL].items():
                take(view, sources.of[name].read(shards))
    except LoadError as error:
        raise TrainError(str(error)) from None
    trainer.optimizer.copy_masters()
    for name, view in tensors.get(AVERAGE, {}).items():
        values_of(view).copy_(values_of(tensors[MODEL][name]))


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
    """Restores the numbers of a state, after its tensors were written to `training_state`.

    Where weights are sharded, all ranks call `AdamW.gather` after that.
    """
    trainer.position = Position(values["steps"], values["sequences"])
    set_random_state(trainer.model.device, values)
    trainer.optimizer.copy_masters()
