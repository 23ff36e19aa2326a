"""Printing: results on standard output, problems as the chosen format requires."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from dsl.diagnostic import Diagnostic, DiagnosticError, render, to_json

PATIENCE = 5.0
"""Seconds in which the first rank of a machine finds what another has found."""

RED, BLUE, RESET = "\033[1;31m", "\033[34m", "\033[0m"


@contextmanager
def reporting(as_json: bool = False) -> Iterator[None]:
    """Prints the problems of a stage, or of reading and writing files, and exits with status 1.

    Text goes to standard error; JSON, the single result of a command, to standard output.
    """
    try:
        yield
    except DiagnosticError as error:
        problems = error.diagnostics
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        problems = [Diagnostic("E690", f"{place}{error.strerror or error}")]
    else:
        return
    _after_first_rank()
    if as_json:
        print_json({"ok": False, "diagnostics": to_json(problems)})
    else:
        print_problems(problems)
    raise typer.Exit(1)


def _after_first_rank() -> None:
    """Waits where torchrun started this process beside a first one, which finds the same problems.

    It prints them and ends, and torchrun then ends the others: a problem is printed once a machine.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)


def print_problems(problems: Iterable[Diagnostic]) -> None:
    problems = list(problems)
    text = render(problems)
    if len(problems) > 1:
        text += f"\n{len(problems)} problems\n"
    sys.stderr.write(colored(text) if use_color() else text)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Prints aligned columns; `align` has `<` or `>` for each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, align, widths, strict=True)
        print("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())


def note(text: str) -> None:
    """Prints a remark to standard error."""
    print(f"dslc: {text}", file=sys.stderr)


def use_color() -> bool:
    """Whether to color standard error (https://no-color.org)."""
    return (
        sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def colored(text: str) -> str:
    """`text` of `render` with the code and the carets in red, the gutter in blue."""
    for pattern, color in (
        (r"^error\[E\d+\]", RED),
        (r"(?<=\| ) *\^+.*$", RED),
        (r"^ *(\d* \||-->|:::|= help:)", BLUE),
    ):
        text = re.sub(pattern, rf"{color}\g<0>{RESET}", text, flags=re.MULTILINE)
    return text
