"""Built packages used from the command line: their import, and the report of their errors."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


@contextmanager
def using(parent: Path, package: str) -> Iterator[Any]:
    """The module `runtime.train.command` of a package in `parent`, and the package's `Model`.

    A TrainError of the package is printed and ends the command with status 1.
    """
    # Off in dslc, whose other commands take half a second.
    gc.enable()
    # Another build of the same name may have been used before.
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.path.insert(0, str(parent.resolve()))
    try:
        command = importlib.import_module(f"{package}.runtime.train.command")
        model = importlib.import_module(package).Model
    except ModuleNotFoundError as error:
        print(f"error: {error}: a built model needs torch and safetensors", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        sys.path.pop(0)
    try:
        yield command, model
    except command.TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def using_run(run: Path) -> Iterator[Any]:
    """The same for the package that a run holds."""
    try:
        package = json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        print(f"error: {run} is not a dslc run directory: run.json cannot be read", file=sys.stderr)
        raise typer.Exit(1) from None
    with using(run, str(package)) as found:
        yield found
