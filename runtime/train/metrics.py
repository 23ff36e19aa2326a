"""What a run says of itself: metrics.jsonl, TensorBoard's files, a line on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..files import replace_text
from .settings import Settings
from .trainer import Step

FILE = "metrics.jsonl"
LOADS_EVERY = 10
"""Steps from one record of the load of each expert to the next; they are long."""


class Metrics:
    """One JSON object a line: of each step, of each evaluation (`held_out`), of each warning."""

    def __init__(self, folder: Path | None, after: int) -> None:
        """Goes on after step `after`; what an earlier process wrote of later ones is dropped.

        Without a folder nothing is recorded: another rank does.
        """
        path = folder / FILE if folder else Path(os.devnull)
        if folder:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= after]
            replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder, after) if folder else None

    def step(self, step: Step, seconds: float) -> None:
        content = asdict(step)
        content["step"] = content.pop("number")
        if step.number % LOADS_EVERY and step.number != 1:
            for use in content["experts"].values():
                del use["load"]
        self.add({**content, "seconds": round(seconds, 4)})

    def add(self, content: dict[str, Any]) -> None:
        """`content` has its `step`."""
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars("", content):
                self._board.add_scalar(name, value, content["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a process did not finish."""
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


class Progress:
    """How far training is: one line that changes on a terminal, one every `pause` seconds else."""

    def __init__(self, settings: Settings, tokens: int, steps: int, out: TextIO, pause: float = 10):
        self.settings, self.out, self.pause = settings, out, pause
        self._live = out.isatty()
        self._begin = self._told = time.monotonic()
        self._tokens_before = self._tokens_told = tokens
        self._share_before = settings.share_done(tokens, steps)

    def show(self, step: Step) -> None:
        now = time.monotonic()
        pause = 0.2 if self._live else self.pause
        if now - self._told < pause and step.number > 1:
            return
        rate = (step.tokens - self._tokens_told) / max(now - self._told, 1e-9)
        self._told, self._tokens_told = now, step.tokens
        self._write(self._line(step, rate, now), end="" if self._live else "\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(text, end="\n")

    def _line(self, step: Step, rate: float, now: float) -> str:
        share = self.settings.share_done(step.tokens, step.number)
        done = share - self._share_before
        left = (now - self._begin) * (1 - share) / done if done > 0 else math.nan
        mtp = f"  mtp {' '.join(f'{x:.3f}' for x in step.mtp)}" if step.mtp else ""
        worst = max((use.max_vio for use in step.experts.values()), default=0.0)
        balance = f"  max_vio {worst:.2f}" if step.experts else ""
        return (
            f"step {step.number:,}  {share:6.1%}  loss {step.main:.4f}{mtp}{balance}  "
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
    """`silent`: another rank tells it."""
    out = Path(os.devnull).open("w", encoding="utf-8") if silent else sys.stderr  # noqa: SIM115
    return Progress(settings, tokens, steps, out)
