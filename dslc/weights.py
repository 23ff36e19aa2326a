"""What `dslc import` and `dslc export` share: a conversion with progress and a report."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.installed import require
from dslc.options import Format

if TYPE_CHECKING:
    from backends.weights import Checkpoint, ConversionProgress

SECONDS = 10.0
"""Seconds between lines of progress where a line cannot be rewritten."""

TargetOption = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)
]
FirstValuesOption = Annotated[
    bool, typer.Option("--first-values", help="Allow weights that still have their initial values.")
]


def parse_size(text: str) -> int:
    """Bytes, as `5GB` or `500MiB`."""
    from dsl.units import parse_quantity

    try:
        size = parse_quantity(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not isinstance(size, int) or size < 1:
        raise typer.BadParameter(f"{text} is not a number of bytes: write it as 5GB")
    return size


MaxFileOption = Annotated[
    int,
    typer.Option(parser=parse_size, metavar="SIZE", help="The largest file to write."),
]
MAX_FILE = "5GB"


def require_torch() -> None:
    """Raises `DiagnosticError` where weights cannot be read."""
    by = "`pip install torch safetensors`"
    require("converting weights", "torch", "safetensors", by=by)


def converted(
    checkpoint: Checkpoint,
    to: Path,
    *,
    fp8: bool,
    first_values: bool,
    max_file: int,
    format: Format,
) -> None:
    """Converts weights and prints the audit. Raises `DiagnosticError`, OSError."""
    from backends.weights import convert
    from dslc.report import note, print_json, print_table
    from dslc.specs import shown

    for text in checkpoint.notes:
        note(text)
    gc.enable()  # off in dslc, whose other commands take half a second
    progress = ProgressPrinter()
    table = convert(
        checkpoint, to, fp8=fp8, first_values=first_values, max_file=max_file, report=progress
    )
    progress.end()
    rows = list(table.rows())
    if format is Format.json:
        names = ("names", "count", "shape", "read", "written", "how", "bytes")
        listed = [dict(zip(names, row, strict=True)) for row in rows]
        print_json({"ok": True, "diagnostics": [], "folder": str(to), "tensors": listed})
        return
    heads = ("tensors", "", "shape", "read", "written", "", "bytes")
    print_table([heads, *rows], "<><<<<>")
    print(f"wrote {shown(to)}: every tensor and its hash are in {shown(to / 'audit.json')}")


@dataclass
class ProgressPrinter:
    """Progress on standard error: one line that is rewritten on a terminal, else one at times."""

    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    terminal: bool = field(default_factory=lambda: sys.stderr.isatty())

    def __call__(self, now: ConversionProgress) -> None:
        at = time.monotonic()
        ended = now.bytes == now.total
        if at - self.printed < (0.1 if self.terminal else SECONDS) and not (
            ended and self.terminal
        ):
            return
        self.printed = at
        line = progress_line(now, at - self.started)
        print(
            f"\r{line:<79}" if self.terminal else line, end=self._end, file=sys.stderr, flush=True
        )

    @property
    def _end(self) -> str:
        return "" if self.terminal else "\n"

    def end(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def progress_line(now: ConversionProgress, seconds: float) -> str:
    """Files, bytes, and, once known, the rate and the remaining time."""
    line = (
        f"file {now.shard} of {now.shards}, {now.bytes / 1e9:.2f} of {now.total / 1e9:.2f} GB"
        f"{f', {now.kept / 1e9:.2f} GB from before' if now.kept else ''}"
    )
    rate = (now.bytes - now.kept) / max(seconds, 1e-3)
    if not rate:
        return line
    left = round((now.total - now.bytes) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return f"{line}, {rate / 1e6:.0f} MB/s, {clock} left"
