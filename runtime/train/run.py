"""A run: a folder with everything that one training makes, from its first step to its last.

`RUN/run.json` says what it is, `RUN/MODEL/` is the built package, `RUN/data/` the tokens if they
were made from text, `RUN/checkpoints/` the states, `RUN/metrics.jsonl` what happened.
"""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..files import replace_text
from ..model import LanguageModel
from .changes import changed, flat
from .checkpoints import Checkpoints
from .device import chosen
from .evaluation import evaluate
from .interrupt import LOCK, stop_signals
from .metrics import Metrics, Progress, progress_to_terminal
from .options import FIXED, Options
from .prepare import check, prepared
from .ranks import Ranks, by_all, by_first, largest
from .sequences import HeldOut, Sequences, split
from .settings import Settings, TrainError
from .state import State, begin_with, restored, state
from .tokens import Tokens
from .trainer import NotFinite, Trainer
from .watch import Watch

RECORD = "run.json"


class Run:
    """A run that begins, or goes on where its newest checkpoint is."""

    def __init__(
        self, model: type[LanguageModel], options: Options, ranks: Ranks | None = None
    ) -> None:
        """Every rank makes one, and they stay equal; the first alone writes.

        Raises TrainError for whatever stands against it, on all ranks the same.
        """
        self.options, self.ranks = options, ranks or Ranks()
        self.settings = Settings.of(model.config)
        self.spec = {
            name: value for name, value in flat("", model.config) if not name.startswith("about")
        }
        self.checkpoints = Checkpoints(
            options.out / "checkpoints", options.keep, self.ranks.writing
        )
        agreeing = self.ranks.agreeing
        self.device = by_all(agreeing, lambda: chosen(options.device))
        self.record, self.newest = by_first(agreeing, lambda: self._begun(model.config))
        self.changes: list[str] = []
        by_all(agreeing, lambda: self._make(model))
        by_first(agreeing, lambda: self._settle(model))

    def _begun(self, config: Config) -> tuple[Mapping[str, Any], Path | None]:
        """What run.json says or will say, and the newest checkpoint; makes tokens if needed."""
        options, record = self.options, read_record(self.options.out)
        if record is not None:
            self._same(record)
            return {**FIXED, **record}, self.checkpoints.newest()
        if _foreign(options.out, config.model):
            raise TrainError(f"{options.out} is no run, and not empty: choose another --out")
        asked = {name: value for name, value in _asked(options).items() if value is not None}
        begin = {**FIXED, **asked}
        place, tokenizer, seed = options.out / "data", begin["tokenizer"], begin["seed"]
        folder = prepared(options.data, place, config, tokenizer, seed)
        return {
            "model": config.model,
            "tokens": self._named(folder),
            "tokens_key": Tokens(folder).header.key,
            "data": _paths(options.data),
            **begin,
        }, None

    def _make(self, model: type[LanguageModel]) -> None:
        """All that a rank trains with."""
        record, length = self.record, self.settings.sequence_length
        self.tokens = Tokens(self.options.out / record["tokens"])
        if self.tokens.header.key != record["tokens_key"]:
            place = self.tokens.folder
            raise TrainError(f"{place} holds other tokens than the run was begun with")
        check(self.tokens, model.config)
        trained, held_out = split(self.tokens.parts, record["held_out"])
        torch.manual_seed(record["seed"])
        first = model(self.device, seed=record["seed"])
        sequences = Sequences(trained, length, record["seed"])
        self.trainer = Trainer(first, self.settings, sequences, self.ranks.training)
        self.held_out = HeldOut(held_out, length)
        if self.newest is not None:
            self._restore(self.newest)
        elif record["weights"]:
            begin_with(self.trainer, Path(record["weights"]))

    def _settle(self, model: type[LanguageModel]) -> None:
        """Nothing stands against the run: its folder becomes that of this model."""
        name, out = model.config.model, self.options.out
        install(Path(inspect.getfile(model)).parent, out / name)
        replace_text(out / RECORD, json.dumps({**self.record, "model": name}, indent=2) + "\n")

    def train(self) -> int | None:
        """Trains to the end, or until it is told to stop; gives the signal that told it.

        Raises TrainError, with the last good state kept.
        """
        trainer, steps, first = self.trainer, self.trainer.position.steps, self.ranks.first
        metrics = Metrics(self.options.out if first else None, steps)
        progress = progress_to_terminal(self.settings, trainer.tokens, steps, silent=not first)
        self._begin(progress)
        if trainer.ended:
            progress.say("training is complete")
            return None
        watch = Watch(trainer.model.config)
        try:
            with stop_signals() as received:
                while not self._stopped(received) and not trainer.ended:
                    self._step(metrics, progress, watch)
                stopped = self._stopped(received)
                self._save_now()
                if not stopped:
                    self._evaluate(metrics, progress, None)
                    stopped = self._stopped(received)
        finally:
            metrics.close()
            self.checkpoints.close()
        return stopped

    def _stopped(self, received: list[int]) -> int | None:
        """The signal that told any rank to stop.

        Raises TrainError if a checkpoint could not be written by now.
        """
        signals, failed = received[0] if received else 0, int(self.checkpoints.failed)
        signal, failed = largest(self.ranks.agreeing, signals, failed)
        if failed:
            self.checkpoints.wait()
        return signal or None

    def _step(self, metrics: Metrics, progress: Progress, watch: Watch) -> None:
        begin = time.monotonic()
        try:
            step = self.trainer.step()
        except NotFinite as error:
            self._save_now()
            place = self.checkpoints.place(self.trainer.position.steps)
            raise NotFinite(f"{error}; the state before it is {place}") from None
        metrics.step(step, time.monotonic() - begin)
        progress.show(step)
        for text in watch.step(step):
            metrics.add({"step": step.number, "warning": text})
            progress.say(f"warning: step {step.number}: {text}")
        if step.number % self.options.save_every == 0:
            self.checkpoints.save(self._state())
        if step.number % self.options.eval_every == 0 and not self.trainer.ended:
            self._evaluate(metrics, progress, self.options.eval_sequences)

    def _begin(self, progress: Progress) -> None:
        for change in self.changes:
            progress.say(f"changed: {change}")
        trainer = self.trainer
        if self.newest is not None:
            progress.say(f"going on from {self.newest}, {trainer.tokens:,} tokens")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        by = f" by {self.ranks.count} ranks" if self.ranks.count > 1 else ""
        progress.say(
            f"{trainer.model.config.model}: {parameters:,} parameters, "
            f"{trainer.sequences.count:,} sequences of {self.settings.sequence_length} tokens an "
            f"epoch, {self.held_out.count:,} held out; on {self.device.type}{by}"
        )

    def _evaluate(self, metrics: Metrics, progress: Progress, limit: int | None) -> None:
        if not self.held_out.count:
            return
        batch = self.settings.micro_batch or 16
        model, tokenizer = self.trainer.model, self.tokens.tokenizer
        found = evaluate(model, self.held_out, tokenizer, batch, limit, self.ranks.training)
        steps = self.trainer.position.steps
        metrics.add({"step": steps, "held_out": asdict(found)})
        progress.say(
            f"step {steps:,}: held out: loss {found.loss:.4f}, "
            f"{found.bits_per_byte:.4f} bits a byte, {found.tokens:,} tokens"
        )

    def _state(self) -> State:
        now = state(self.trainer)
        here = {"ranks": self.ranks.count, "device": self.device.type, "spec": self.spec}
        return State(now.tensors, {**now.values, **here})

    def _save_now(self) -> None:
        self.checkpoints.wait()
        steps = self.trainer.position.steps
        if by_first(self.ranks.agreeing, lambda: steps not in self.checkpoints.steps()):
            self.checkpoints.save(self._state())
            self.checkpoints.wait()

    def _same(self, record: Mapping[str, Any]) -> None:
        """Raises TrainError if the run was begun with other options."""
        asked = {**_asked(self.options), "data": _paths(self.options.data) or None}
        for name, value in asked.items():
            before, option = record.get(name), f"--{name.replace('_', '-')}"
            if value is not None and before != value:
                begun = f"with {option} {before}" if before is not None else f"without {option}"
                raise TrainError(
                    f"{self.options.out} was begun {begun}, not {value}: choose another --out"
                )

    def _named(self, tokens: Path) -> str:
        """The folder of the tokens: relative if it is the run's own, which may be moved."""
        return tokens.name if tokens.parent == self.options.out else str(tokens.resolve())

    def _restore(self, newest: Path) -> None:
        values = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        self.changes = changed(values["spec"], self.spec)
        # Each step has the same sequences all the same: only rounding differs.
        ranks, device = values.get("ranks", 1), values.get("device", "cpu")
        if ranks != self.ranks.count:
            self.changes.append(
                f"{ranks} ranks before, {self.ranks.count} now: sums in another order, so not the "
                f"same bits"
            )
        if device != self.device.type:
            self.changes.append(
                f"on {device} before, on {self.device.type} now: other sums, so not the same bits"
            )
        views = state(self.trainer)
        restored(self.trainer, self.checkpoints.load(newest, views))


def _asked(options: Options) -> dict[str, Any]:
    """What is asked for of what stays (`FIXED`); None for what is not named."""
    weights = options.weights.resolve() if options.weights else None
    return {
        **{name: getattr(options, name) for name in FIXED},
        "weights": str(weights) if weights else None,
    }


def _paths(files: tuple[Path, ...]) -> list[str]:
    return [str(file.resolve()) for file in files]


def read_record(folder: Path) -> Mapping[str, Any] | None:
    """What run.json says; None where there is no run."""
    try:
        content: Mapping[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(f"{folder / RECORD} cannot be read: {error}") from None


def _foreign(folder: Path, model: str) -> bool:
    """Whether a folder without run.json holds more than what a run leaves that could not begin."""
    if not folder.exists():
        return False
    own = {"data", model, f".{model}.new", f".{RECORD}.new", LOCK}
    return not folder.is_dir() or not {path.name for path in folder.iterdir()} <= own


def install(package: Path, place: Path) -> None:
    """Makes the run hold the package that it is trained by, so that it can be used alone."""
    manifests = [folder / "manifest.json" for folder in (package, place)]
    if (
        all(m.exists() for m in manifests)
        and manifests[0].read_bytes() == manifests[1].read_bytes()
    ):
        return
    fresh = place.with_name(f".{place.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        shutil.copytree(package, fresh, ignore=shutil.ignore_patterns("__pycache__"))
    except shutil.Error as error:  # one for each file
        raise OSError(error.args[0][0][2]) from None
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
