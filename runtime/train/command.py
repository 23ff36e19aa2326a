"""What `python -m MODEL.train` and `dslc eval` do with a built model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model import LanguageModel
from ..shards import LoadError
from . import evaluation
from .checkpoints import Checkpoints
from .evaluation import Evaluation
from .interrupt import run_lock
from .memory import LESS, shortage
from .options import Options, parse
from .ranks import init_process_groups, on_rank0
from .run import Run, read_record
from .sequences import ValidationSet, split
from .settings import Settings, TrainError
from .state import AVERAGE, MODEL
from .tokens import Tokens

if TYPE_CHECKING:
    from .dryrun import DryRun


def main(model: type[LanguageModel], arguments: Sequence[str] | None = None) -> int:
    """Trains with the options of a command line (sys.argv by default); returns the exit status.

    0: trained to the end, 1: failed, 2: wrong usage, 128 + n: stopped by signal n and saved.
    """
    try:
        name = model.config.model
        about = f"Train {name} on text. The same command resumes a run that was stopped."
        return train(model, parse(Options, f"python -m {name}.train", about, arguments))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(
    model: type[LanguageModel], options: Options, made_from: Mapping[str, Any] | None = None
) -> int:
    """The same with options, for one process or a rank that torchrun started.

    `made_from` says in run.json which spec the package was built of, with which changes.

    Raises TrainError if training fails; of several ranks, only rank 0 does, the others return 1.
    """
    with init_process_groups() as ranks:
        try:
            with ExitStack() as held:
                on_rank0(ranks.control, lambda: held.enter_context(run_lock(options.out)))
                stopped = Run(model, options, ranks, made_from).train()
        except (TrainError, OSError) as error:
            if not ranks.is_rank0:
                return 1
            if isinstance(error, TrainError):
                raise
            reason = error.strerror or error
            raise TrainError(f"cannot write {options.out}: {reason}") from None
        except (MemoryError, RuntimeError) as error:
            lack = shortage(error)
            if lack is None:
                raise
            kept = f"; {options.out} resumes from its newest checkpoint"
            raise TrainError(f"{lack}; {LESS}{kept if read_record(options.out) else ''}") from None
    return 128 + stopped if stopped else 0


def dryrun(model: type[LanguageModel], rank: int) -> DryRun:
    """What a rank of the layout of a model holds and sends in a step. Raises TrainError."""
    from .dryrun import dryrun as run  # here: it needs torch's pieces for tests

    return run(model, rank)


def dryrun_rows(
    model: type[LanguageModel], rank: int, done: Callable[[DryRun], None]
) -> tuple[list[DryRun], list[str]]:
    """The same of one rank for each pipeline rank, and which messages do not match.

    `done` is called with each as soon as it is known. Raises TrainError.
    """
    from .dryrun import rows, unmatched

    found = []
    for one in rows(model, rank):
        done(one)
        found.append(one)
    return found, list(unmatched(found))


def evaluate(model: type[LanguageModel], run: Path, average: bool) -> Evaluation:
    """Evaluates the newest checkpoint of a run on the held-out text. Raises TrainError.

    `average` takes the moving average of the weights instead of the weights.
    """
    record, tokens, checkpoint = open_run(run)
    _, held_out = split(tokens.parts, record["held_out"])
    settings = Settings.of(model.config)
    text = ValidationSet(held_out, settings.sequence_length)
    if not text.count:
        raise TrainError(f"{run} has no held-out text: start a run with --held-out 0.1")
    trained = load_checkpoint(model, checkpoint, average)
    return evaluation.evaluate(trained, text, tokens.tokenizer, settings.micro_batch or 16)


def open_run(run: Path) -> tuple[Mapping[str, Any], Tokens, Path]:
    """The record, the tokens and the newest checkpoint of a run. Raises TrainError."""
    record = read_record(run)
    if record is None:
        raise TrainError(f"{run} is not a dslc run directory: it has no run.json")
    checkpoint = Checkpoints(run / "checkpoints", keep=1).newest()
    if checkpoint is None:
        raise TrainError(f"{run} has no checkpoint yet")
    return record, Tokens(run / record["tokens"]), checkpoint


def weights_in(checkpoint: Path, average: bool) -> Path:
    """The folder of the weights of a checkpoint, or of their moving average. Raises TrainError."""
    folder = checkpoint / (AVERAGE if average else MODEL)
    if not folder.is_dir():
        raise TrainError(f"{checkpoint} has no moving average: the spec sets no train.ema")
    return folder


def load_checkpoint(model: type[LanguageModel], checkpoint: Path, average: bool) -> LanguageModel:
    """A model with the weights of a checkpoint, or with their moving average."""
    folder = weights_in(checkpoint, average)
    trained = model(device="meta")
    try:
        trained.load(folder)
    except LoadError as error:
        raise TrainError(str(error)) from None
    return trained
