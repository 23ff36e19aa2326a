"""The output of a run: metrics.jsonl, TensorBoard files, Weights & Biases, and the terminal."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..files import replace_text
from .performance import Performance
from .settings import Settings, TrainError
from .trainer import StepMetrics

FILE = "metrics.jsonl"
WANDB_ID = "wandb-id"
"""The file with the id that a run has there."""
LOADS_EVERY = 10
"""Steps between records of the load of each expert, which are long."""


class Metrics:
    """One JSON object per line, for each step, evaluation (`held_out`) and warning."""

    def __init__(self, folder: Path | None, after: int, wandb: Wandb | None = None) -> None:
        """Resumes after step `after`; lines of later steps by an earlier process are dropped.

        Without a folder nothing is recorded: that is for ranks other than 0.
        """
        path = folder / FILE if folder else Path(os.devnull)
        if folder:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= after]
            replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder, after) if folder else None
        self._wandb = wandb

    def step(
        self, step: StepMetrics, seconds: float, performance: Performance | None = None
    ) -> None:
        content = asdict(step)
        content["step"] = content.pop("number")
        if step.number % LOADS_EVERY and step.number != 1:
            for experts in content["experts"].values():
                del experts["load"]
        content["seconds"] = round(seconds, 4)
        if performance is not None:
            content["performance"] = asdict(performance)
        self.add(content)

    def add(self, content: dict[str, Any]) -> None:
        """`content` has its `step`."""
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars("", content):
                self._board.add_scalar(name, value, content["step"])
        if self._wandb is not None:
            self._wandb.log(dict(_scalars("", content)), content["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _scalars(prefix: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, int | float):
        return [] if prefix == "step" else [(prefix, float(value))]
    if isinstance(value, tuple) and not prefix.endswith("/load"):  # the depths of MTP
        value = dict(enumerate(value, 1))
    if not isinstance(value, dict):
        return []
    deeper = [_scalars(f"{prefix}/{name}" if prefix else str(name), v) for name, v in value.items()]
    return [pair for part in deeper for pair in part]


def _board(folder: Path, after: int) -> Any:
    """TensorBoard's writer, where its package is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)


class Wandb:
    """A run of Weights & Biases, the same one whenever the run in `folder` is resumed."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        """`config` is shown next to the curves. Raises TrainError where it cannot start."""
        place = folder / WANDB_ID
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(place, uuid.uuid4().hex)
        try:
            self._run: Any = require_wandb().init(
                project=project,
                name=folder.resolve().name,
                id=place.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except TrainError:
            raise
        except Exception as error:  # of the network, of the login, of the library
            raise TrainError(f"--wandb {project}: Weights & Biases: {error}") from None
        # Steps after the last checkpoint come again when a run resumes: they are an axis, and not
        # the count of wandb's own, which only grows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


def require_wandb() -> Any:
    """The package. Raises TrainError without it."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise TrainError("--wandb needs the package wandb: pip install wandb") from None


class Progress:
    """Progress: one line that is rewritten on a terminal, elsewhere one every `pause` seconds."""

    def __init__(self, settings: Settings, tokens: int, steps: int, out: TextIO, pause: float = 10):
        self.settings, self.out, self.pause = settings, out, pause
        self._live = out.isatty()
        self._start = self._shown = time.monotonic()
        self._tokens_shown = tokens
        self._done_before = settings.fraction_done(tokens, steps)

    def show(self, step: StepMetrics) -> None:
        now = time.monotonic()
        pause = 0.2 if self._live else self.pause
        if now - self._shown < pause and step.number > 1:
            return
        rate = (step.tokens - self._tokens_shown) / max(now - self._shown, 1e-9)
        self._shown, self._tokens_shown = now, step.tokens
        self._write(self._line(step, rate, now), end="" if self._live else "\n")

    def say(self, text: str) -> None:
        """Prints a line that is not rewritten."""
        self._write(text, end="\n")

    def _line(self, step: StepMetrics, rate: float, now: float) -> str:
        fraction = self.settings.fraction_done(step.tokens, step.number)
        done = fraction - self._done_before
        left = (now - self._start) * (1 - fraction) / done if done > 0 else math.nan
        mtp = f"  mtp {' '.join(f'{x:.3f}' for x in step.mtp)}" if step.mtp else ""
        worst = max((experts.max_vio for experts in step.experts.values()), default=0.0)
        balance = f"  max_vio {worst:.2f}" if step.experts else ""
        return (
            f"step {step.number:,}  {fraction:6.1%}  loss {step.main:.4f}{mtp}{balance}  "
            f"lr {step.learning_rate:.2e}  norm {step.gradient_norm:.2f}  "
            f"{rate:,.0f} tokens/s  {_clock(left)} left"
        )

    def _write(self, text: str, end: str) -> None:
        start = "\r\x1b[K" if self._live else ""
        self.out.write(f"{start}{text}{end}")
        self.out.flush()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_to_terminal(settings: Settings, tokens: int, steps: int, silent: bool) -> Progress:
    """`silent` for ranks other than 0."""
    out = Path(os.devnull).open("w", encoding="utf-8") if silent else sys.stderr  # noqa: SIM115
    return Progress(settings, tokens, steps, out)
