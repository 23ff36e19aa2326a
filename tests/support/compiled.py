"""A tiny model with a compiled step, which processes of one run of pytest compile once."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from backends.build import build
from dsl.load import load
from tests.support.places import TINY

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the path")

SETS = ("params.vocab_size=96", "train.initializer_range=0.1")


def package(factory: pytest.TempPathFactory, name: str, *sets: str) -> ModuleType:
    """The built package `name`, imported; a model like that of `tiny.py`."""
    base = factory.getbasetemp()
    # Beside the folders of workers, so that they find what another one compiled.
    shared = (base.parent if base.name.startswith("popen-") else base) / "compiled"
    build(load(TINY, sets=[*SETS, f"model={name}", *sets]), shared / name, cpu=True)
    if str(shared) not in sys.path:
        sys.path.insert(0, str(shared))
    return importlib.import_module(name)


def part(package: ModuleType, name: str) -> ModuleType:
    """A module of the package's `runtime`."""
    return importlib.import_module(f"{package.__name__}.runtime.{name}")


def source(package: ModuleType) -> Path:
    return Path(package.__file__ or "").parent / "cpu" / "step.cpp"
