"""A run: a folder with everything that one training produces, from its first step to its last.

`RUN/run.json` holds the fixed options, `RUN/MODEL/` the built package, `RUN/data/` the tokens if
they were made from text, `RUN/checkpoints/` the states, `RUN/metrics.jsonl` the metrics.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from ..config import Config
from ..files import replace_text
from ..model import LanguageModel
from .changes import flatten, spec_changes
from .checkpoints import Checkpoints
from .device import select_device
from .evaluation import evaluate
from .health import HealthMonitor
from .interrupt import LOCK, RECORD, stop_signals
from .memory import require_memory
from .metrics import WANDB_ID, Metrics, Progress, Wandb, progress_to_terminal, require_wandb
from .options import FIXED, Options
from .parallel import MeshTrainer, make_mesh, make_trainer
from .performance import Performance, measure, profiled
from .prepare import check_tokens, prepare_tokens
from .ranks import ProcessGroups, all_reduce_max, on_all_ranks, on_rank0
from .sequences import Sequences, ValidationSet, split
from .settings import Settings, TrainError
from .state import State, load_weights, restore, training_state
from .tokens import Tokens
from .trainer import NotFinite, StepMetrics
from .waits import Waits, hang_report


class Run:
    """A new run, or one that resumes from its newest checkpoint."""

    def __init__(
        self,
        model: type[LanguageModel],
        options: Options,
        ranks: ProcessGroups | None = None,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        """Every rank has one, and they stay equal; only rank 0 writes.

        `made_from` is recorded: the spec, variants and changes that the package is built of.

        Raises TrainError, the same on all ranks, if the run cannot start.
        """
        self.options, self.ranks = options, ranks or ProcessGroups()
        self.made_from = made_from or {}
        self.settings = Settings.of(model.config)
        self.spec = {
            name: value for name, value in flatten("", model.config) if not name.startswith("about")
        }
        self.checkpoints = Checkpoints(
            options.out / "checkpoints", options.keep, self.ranks.writing
        )
        control = self.ranks.control
        self.device = on_all_ranks(control, lambda: select_device(options.device))
        self.mesh = make_mesh(model, self.ranks, self.device)
        self.waits = Waits()
        if self.ranks.world_size == 1:
            require_memory(model, self.device)
        self.record, self.newest = on_rank0(control, lambda: self._read_or_create(model.config))
        self.changes: list[str] = []
        on_all_ranks(control, lambda: self._make(model))
        if self.newest is not None or self.record["weights"]:
            self.trainer.optimizer.gather()
        on_rank0(control, lambda: self._install(model))

    def _read_or_create(self, config: Config) -> tuple[Mapping[str, Any], Path | None]:
        """The content of run.json and the newest checkpoint; makes tokens for a new run."""
        options, record = self.options, read_record(self.options.out)
        if options.wandb is not None:
            require_wandb()
        if record is not None:
            self._check_fixed(record)
            return {**FIXED, **record}, self.checkpoints.newest()
        if _is_foreign(options.out, config.model):
            raise TrainError(f"{options.out} is not empty and not a run: choose another --out")
        given = {name: value for name, value in _given(options).items() if value is not None}
        fixed = {**FIXED, **given}
        place, tokenizer, seed = options.out / "data", fixed["tokenizer"], fixed["seed"]
        template = options.chat_template
        folder = prepare_tokens(options.data, place, config, tokenizer, seed, template)
        return {
            "model": config.model,
            "tokens": self._named(folder),
            "tokens_key": Tokens(folder).header.key,
            "data": _paths(options.data),
            **fixed,
        }, None

    def _make(self, model: type[LanguageModel]) -> None:
        """Makes the model, the data and the trainer of a rank."""
        record, length = self.record, self.settings.sequence_length
        self.tokens = Tokens(self.options.out / record["tokens"])
        if self.tokens.header.key != record["tokens_key"]:
            place = self.tokens.folder
            raise TrainError(f"{place} holds other tokens than the run was started with")
        check_tokens(self.tokens, model.config)
        if self.mesh is not None and self.tokens.masked:
            raise TrainError(
                "chats, of which only answers are trained on, are not trained by the ranks of a "
                "section `parallel`, whose terms count all tokens: leave the section out"
            )
        trained, held_out = split(self.tokens.parts, record["held_out"])
        torch.manual_seed(record["seed"])
        sequences = Sequences(trained, length, record["seed"])
        self.trainer = make_trainer(
            model,
            self.device,
            record["seed"],
            self.settings,
            sequences,
            self.ranks,
            self.mesh,
            self.waits,
        )
        self.held_out = ValidationSet(held_out, length)
        if self.newest is not None:
            self._restore(self.newest)
        elif record["weights"]:
            load_weights(self.trainer, Path(record["weights"]))

    def _install(self, model: type[LanguageModel]) -> None:
        """Writes the package and run.json, once nothing else can fail."""
        name, out = model.config.model, self.options.out
        install_package(Path(inspect.getfile(model)).parent, out / name)
        record = {**self.record, "model": name, **self.made_from}
        replace_text(out / RECORD, json.dumps(record, indent=2) + "\n")

    def train(self) -> int | None:
        """Trains to the end or until a signal to stop, which it returns.

        Raises TrainError if training fails; the last good state is then saved.
        """
        trainer, steps, first = self.trainer, self.trainer.position.steps, self.ranks.is_rank0
        shown = first and not trainer.ended
        wandb = on_all_ranks(self.ranks.control, lambda: self._wandb() if shown else None)
        metrics = Metrics(self.options.out if first else None, steps, wandb)
        progress = progress_to_terminal(self.settings, trainer.tokens, steps, silent=not first)
        self._announce(progress)
        if trainer.ended:
            progress.say("training is complete")
            return None
        monitor = HealthMonitor(trainer.model.config)
        try:
            with (
                stop_signals() as received,
                hang_report(self.waits, self.ranks, self.options.patience),
                profiled(*self._trace()) as profiled_step,
            ):
                while not self._stopped(received) and not trainer.ended:
                    self._step(metrics, progress, monitor)
                    profiled_step()
                stopped = self._stopped(received)
                self._save_now()
                if not stopped:
                    self._evaluate(metrics, progress, None)
                    stopped = self._stopped(received)
        finally:
            metrics.close()
            self.checkpoints.close()
        if stopped:
            steps = trainer.position.steps
            progress.say(
                f"stopped by {Signals(stopped).name} after step {steps:,}; "
                f"saved {self.checkpoints.place(steps)}, from which the same command resumes"
            )
        return stopped

    def _wandb(self) -> Wandb | None:
        """The run in Weights & Biases that `--wandb` asks for."""
        if self.options.wandb is None:
            return None
        config = {**self.spec, "seed": self.record["seed"]}
        return Wandb(self.options.wandb, self.options.out, config)

    def _trace(self) -> tuple[int | None, Path]:
        """How many steps are traced, and where: of ranks that do the same only the first."""
        rank = self.ranks.control.rank() if self.ranks.control else 0
        first = rank == 0 if self.mesh is None else self.mesh.data == 0
        path = self.options.out / "profile" / f"rank-{rank}.json"
        return self.options.profile if first else None, path

    def _stopped(self, received: list[int]) -> int | None:
        """The signal to stop that any rank received.

        Raises TrainError if writing a checkpoint has failed.
        """
        signals, failed = received[0] if received else 0, int(self.checkpoints.failed)
        with self.waits.waiting("the start of a step", range(self.ranks.world_size)):
            signal, failed = all_reduce_max(self.ranks.control, signals, failed)
        if failed:
            self.checkpoints.wait()
        return signal or None

    def _step(self, metrics: Metrics, progress: Progress, monitor: HealthMonitor) -> None:
        start, waited = time.monotonic(), self.waits.seconds
        try:
            step = self.trainer.step()
        except NotFinite as error:
            self._save_now()
            place = self.checkpoints.place(self.trainer.position.steps)
            raise NotFinite(f"{error}; the state before it is saved in {place}") from None
        seconds = time.monotonic() - start
        metrics.step(step, seconds, self._performance(step, seconds, self.waits.seconds - waited))
        progress.show(step)
        for text in monitor.warnings(step):
            metrics.add({"step": step.number, "warning": text})
            progress.say(f"warning: step {step.number}: {text}")
        if step.number % self.options.save_every == 0:
            self.checkpoints.save(self._state())
        if step.number % self.options.eval_every == 0 and not self.trainer.ended:
            self._evaluate(metrics, progress, self.options.eval_sequences)

    def _performance(self, step: StepMetrics, seconds: float, waited: float) -> Performance | None:
        """What a step took on the ranks of a layout, whose build says how much work it is."""
        parallel = self.trainer.model.config.parallel
        if parallel is None:
            return None
        tokens = step.batch * self.settings.sequence_length
        return measure(parallel, self.ranks, self.device, tokens, seconds, waited)

    def _announce(self, progress: Progress) -> None:
        for change in self.changes:
            progress.say(f"changed: {change}")
        trainer = self.trainer
        if self.newest is not None:
            progress.say(f"resuming from {self.newest}, {trainer.tokens:,} tokens")
        parameters = sum(p.numel() for p in trainer.model.whole.parameters())
        by = f", {self.ranks.world_size} ranks" if self.ranks.world_size > 1 else ""
        progress.say(
            f"{trainer.model.config.model}: {parameters:,} parameters, "
            f"{trainer.sequences.count:,} sequences of {self.settings.sequence_length} tokens per "
            f"epoch, {self.held_out.count:,} held out; on {self.device.type}{by}"
        )
        if isinstance(trainer, MeshTrainer) and len(trainer.batches) > 1:
            stairs = ", ".join(f"{batch:,}" for batch in trainer.batches)
            progress.say(f"batches are rounded to those that can be dealt: {stairs} sequences")

    def _evaluate(self, metrics: Metrics, progress: Progress, limit: int | None) -> None:
        if not self.held_out.count:
            return
        batch = self.settings.micro_batch or 16
        model, tokenizer = self.trainer.model, self.tokens.tokenizer
        pipeline = self.trainer if isinstance(self.trainer, MeshTrainer) else None
        found = evaluate(
            model, self.held_out, tokenizer, batch, limit, self.ranks.training, pipeline
        )
        steps = self.trainer.position.steps
        metrics.add({"step": steps, "held_out": asdict(found)})
        progress.say(
            f"step {steps:,}: held out: loss {found.loss:.4f}, "
            f"{found.bits_per_byte:.4f} bits per byte, {found.tokens:,} tokens"
        )

    def _state(self) -> State:
        now = training_state(self.trainer)
        here = {"ranks": self.ranks.world_size, "device": self.device.type, "spec": self.spec}
        return State(now.tensors, {**now.values, **here})

    def _save_now(self) -> None:
        self.checkpoints.wait()
        steps = self.trainer.position.steps
        if on_rank0(self.ranks.control, lambda: steps not in self.checkpoints.steps()):
            self.checkpoints.save(self._state())
            self.checkpoints.wait()

    def _check_fixed(self, record: Mapping[str, Any]) -> None:
        """Raises TrainError if the run was started with other values of the fixed options."""
        given = {**_given(self.options), "data": _paths(self.options.data) or None}
        for name, value in given.items():
            before, option = record.get(name), f"--{name.replace('_', '-')}"
            if value is not None and before != value:
                started = f"with {option} {before}" if before is not None else f"without {option}"
                raise TrainError(
                    f"{self.options.out} was started {started}, not {value}: choose another --out"
                )

    def _named(self, tokens: Path) -> str:
        """The folder of the tokens, relative inside the run, so that the run can be moved."""
        return tokens.name if tokens.parent == self.options.out else str(tokens.resolve())

    def _restore(self, newest: Path) -> None:
        values = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        self.changes = spec_changes(values["spec"], self.spec)
        # Each step still has the same sequences: only rounding differs.
        ranks, device = values.get("ranks", 1), values.get("device", "cpu")
        if ranks != self.ranks.world_size:
            self.changes.append(
                f"{ranks} ranks before, {self.ranks.world_size} now: sums have another "
                f"order, results are not bit-identical"
            )
        if device != self.device.type:
            self.changes.append(
                f"on {device} before, on {self.device.type} now: results are not bit-identical"
            )
        views = training_state(self.trainer)
        restore(self.trainer, self.checkpoints.load(newest, views))


def _given(options: Options) -> dict[str, Any]:
    """The fixed options of a command line; None for those that are not given."""
    values = {name: getattr(options, name) for name in FIXED}
    paths = {name: str(v.resolve()) for name, v in values.items() if isinstance(v, Path)}
    return {**values, **paths}


def _paths(files: tuple[Path, ...]) -> list[str]:
    return [str(file.resolve()) for file in files]


def read_record(folder: Path) -> Mapping[str, Any] | None:
    """The content of run.json; None where there is no run."""
    try:
        content: Mapping[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(f"{folder / RECORD} cannot be read: {error}") from None


def _is_foreign(folder: Path, model: str) -> bool:
    """Whether a folder without run.json holds more than what a run that failed to start leaves."""
    if not folder.exists():
        return False
    own = {"data", model, f".{model}.new", f".{RECORD}.new", LOCK, WANDB_ID}
    return not folder.is_dir() or not {path.name for path in folder.iterdir()} <= own


def install_package(package: Path, place: Path) -> None:
    """Copies the package into the run, so that the run can be used on its own."""
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
        number = re.match(r"\[Errno (\d+)\]", error.args[0][0][2])
        why = (int(number[1]), os.strerror(int(number[1]))) if number else (error.args[0][0][2],)
        raise OSError(*why) from None
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)
