"""The training settings of a spec, checked before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import Config, Schedule


class TrainError(Exception):
    """An error that the user has to fix before training can start or continue."""


@dataclass(frozen=True)
class Settings:
    """The section `train` of a spec, complete. Schedules depend on tokens and steps."""

    sequence_length: int
    batch: Schedule
    """Sequences of a step, over all ranks."""
    micro_batch: int | None
    """Sequences in one forward pass of a rank; None: all of its batch."""
    learning_rate: Schedule
    bias_update: Schedule
    optimizer: Config
    ema: float | None
    steps: int | None
    tokens: int | None

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The settings of a built model. Raises TrainError with all that is missing or wrong."""
        problems = list(_problems(config))
        if problems:
            raise TrainError(
                "the training settings of the spec are incomplete or wrong:\n  "
                + "\n  ".join(problems)
            )
        train = config.train
        return cls(**{name: train[name] for name in cls.__dataclass_fields__})

    def batch_at(self, tokens: int, steps: int) -> int:
        """Sequences of the step that follows so many tokens and steps."""
        return max(1, round(self.batch.value_at(tokens, steps)))

    def fraction_done(self, tokens: int, steps: int) -> float:
        """The fraction of training that is done, from 0 to 1; tokens or steps, which ends first."""
        ends = ((tokens, self.tokens), (steps, self.steps))
        return min(1.0, max(done / end for done, end in ends if end is not None))


def _problems(config: Config) -> Iterator[str]:
    train = config.train
    needed = {
        "sequence_length": "tokens of a sequence, such as 256",
        "batch": "sequences of a step, such as 16",
        "learning_rate": "a number or a list of phases, such as 3e-4",
    }
    for name, example in needed.items():
        if train[name] is None:
            yield f"train.{name} is missing ({example})"
    if train.steps is None and train.tokens is None:
        yield "train.steps or train.tokens is missing (when training ends, such as 10M)"
    if not (train.optimizer.beta1 < 1 and train.optimizer.beta2 < 1):
        yield "train.optimizer.beta1 and beta2 must be below 1"
