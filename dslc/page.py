"""The page of `dslc graph --html`."""

from __future__ import annotations

from pathlib import Path

from backends import VERSION
from backends.report.steps import render_steps
from compiler.pipeline import Compiled
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description
from dslc.specs import shown
from runtime.files import replace_text


def write(description: Description, compiled: Compiled, output: Path | None, start: str) -> None:
    """Writes the page and prints its path. Raises `DiagnosticError` to protect other files.

    `start` is the view it opens with, as in `render_steps`.
    """
    text = render_steps(description, compiled, version=VERSION, start=start)
    path = output or Path(f"{description.spec.model}.html")
    if path.exists() and not _ours(path):
        message = f"{path} exists and was not written by dslc"
        raise DiagnosticError([Diagnostic("E692", message, help="choose another file with -o")])
    replace_text(path, text)
    print(f"wrote {shown(path)}: {len(text.encode()) // 1000:,} KB")


def _ours(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="dslc ' in file.read(2000)
