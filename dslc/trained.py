"""Built packages used from the command line: their import, and the report of their errors."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

TRAIN, SERVE = "runtime.train.command", "runtime.serve.command"
GENERATE = "runtime.serve.offline"
"""What packages are used for."""
NEEDS = "a built model needs torch and safetensors"
OLDER = "the package was built by an older dslc (`dslc export` writes its weights as a folder)"


@contextmanager
def using(parent: Path, package: str, what: str = TRAIN) -> Iterator[Any]:
    """The module `what` of a package in `parent`, and the package's `Model`.

    A TrainError of the package is printed and ends the command with status 1.
    """
    # Off in dslc, whose other commands take half a second.
    gc.enable()
    # Another build of the same name may have been used before.
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.path.insert(0, str(parent.resolve()))
    try:
        command = importlib.import_module(f"{package}.{what}")
        model = importlib.import_module(package).Model
    except ModuleNotFoundError as error:
        # The name is of a module that the package lacks, or of a library.
        older = (error.name or "").startswith(f"{package}.")
        needs = OLDER if older else NEEDS
        print(f"error: {error}: {needs}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        sys.path.pop(0)
    try:
        yield command, model
    except command.TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def failing() -> Iterator[None]:
    """For commands that run code of `runtime` without a package: its errors end them alike."""
    from runtime.train.settings import TrainError

    gc.enable()
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: {error}: this needs torch", file=sys.stderr)
        raise typer.Exit(1) from None
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def using_run(run: Path, what: str = TRAIN) -> Iterator[Any]:
    """The same for the package that a run holds."""
    try:
        package = json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        print(f"error: {run} is not a dslc run directory: run.json cannot be read", file=sys.stderr)
        raise typer.Exit(1) from None
    with using(run, str(package), what) as found:
        yield found


@contextmanager
def using_source(
    source: Path, spec: str | None, what: str, *, weights: str | None = None
) -> Iterator[tuple[Any, Any, Path, bool]]:
    """The same, with the folder that holds the package, for a run or a folder of weights; whether
    it is a run. For weights the package is built, from their config.json or `spec`: where they
    shall be quantized (`weights`), with a compiled step, which reads them."""
    from backends.build import build
    from backends.read import is_run
    from backends.weights import description_of
    from dslc.report import reporting
    from dslc.specs import read

    with reporting():
        trained = is_run(source)
    if trained:
        with using_run(source, what) as (command, model):
            yield command, model, source, True
        return
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder)
        with reporting():
            # Files say which weights they hold in FP8, and nothing of products.
            sets = ["precision.policy=fp8_blockwise"] if weights == "fp8" else []
            found = description_of(source, sets) if spec is None else read(spec, sets, None)
            build(found, parent / found.spec.model, cpu=weights is not None)
        with using(parent, found.spec.model, what) as (command, model):
            yield command, model, parent, False
