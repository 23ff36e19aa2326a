"""What `dslc import` and `dslc export` have in common: a conversion, watched and told."""

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
    from backends.weights import Checkpoint, Progress

SECONDS = 10.0
"""From one line of progress to the next where lines cannot be written over."""

TargetOption = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)
]
FirstValuesOption = Annotated[
    bool, typer.Option("--first-values", help="Allow weights that still are what they began as.")
]


def parse_size(text: str) -> int:
    """Bytes, as `5GB` or `500MiB`."""
    from dsl.units import parse_quantity

    try:
        size = parse_quantity(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not isinstance(size, int) or size < 1:
        raise typer.BadParameter(f"{text} is no number of bytes: write it as 5GB")
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
    from dslc.report import print_json, print_table
    from dslc.specs import shown

    gc.enable()  # dslc looks for no garbage, which is right for half a second only
    watched = Watched()
    table = convert(
        checkpoint, to, fp8=fp8, first_values=first_values, max_file=max_file, report=watched
    )
    watched.end()
    rows = list(table.rows())
    if format is Format.json:
        names = ("names", "count", "shape", "read", "written", "how", "bytes")
        said = [dict(zip(names, row, strict=True)) for row in rows]
        print_json({"ok": True, "diagnostics": [], "folder": str(to), "tensors": said})
        return
    heads = ("tensors", "", "shape", "read", "written", "", "bytes")
    print_table([heads, *rows], "<><<<<>")
    print(f"wrote {shown(to)}: every tensor and its hash are in {shown(to / 'audit.json')}")


@dataclass
class Watched:
    """Lines on standard error: one that is written over on a terminal, else one now and then."""

    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    terminal: bool = field(default_factory=sys.stderr.isatty)

    def __call__(self, now: Progress) -> None:
        at = time.monotonic()
        ended = now.bytes == now.total
        if at - self.told < (0.1 if self.terminal else SECONDS) and not (ended and self.terminal):
            return
        self.told = at
        line = progress_line(now, at - self.began)
        print(
            f"\r{line:<79}" if self.terminal else line, end=self._end, file=sys.stderr, flush=True
        )

    @property
    def _end(self) -> str:
        return "" if self.terminal else "\n"

    def end(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def progress_line(now: Progress, seconds: float) -> str:
    """Files, bytes, and, once there is one, the rate and the time that is left at it."""
    line = (
        f"file {now.shard} of {now.shards}, {now.bytes / 1e9:.2f} of {now.total / 1e9:.2f} GB"
        f"{f', {now.kept / 1e9:.2f} GB kept' if now.kept else ''}"
    )
    rate = (now.bytes - now.kept) / max(seconds, 1e-3)
    if not rate:
        return line
    left = round((now.total - now.bytes) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return f"{line}, {rate / 1e6:.0f} MB/s, {clock} left"
