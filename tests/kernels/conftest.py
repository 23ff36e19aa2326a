"""Kernels as a build ships them, imported from their files and interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import pytest

from backends.triton.launches import load
from backends.triton.target import TARGETS
from tests.support.interpreter import repair
from tests.support.kernels import KernelLoader, files_of


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Each GPU in turn: its own file is the one that is interpreted."""
    return str(request.param)


@pytest.fixture(params=["sm_90", "gfx942"])
def vendor(request: pytest.FixtureRequest) -> str:
    """A GPU of each vendor, for files that differ between two of one in numbers of programs."""
    return str(request.param)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelLoader:
    """`kernels("norm", spec, target, sets)`: the module that the build of a spec ships."""
    repair()

    @cache
    def module(file: str, spec: str, target: str, sets: tuple[str, ...] = ()) -> ModuleType:
        (found,) = (one for one in files_of(spec, target, sets) if one.name == file)
        folder = tmp_path_factory.mktemp("kernels")
        (folder / f"{file}.py").write_text(found.text, encoding="utf-8")
        return load(folder / f"{file}.py")

    def get(file: str, spec: str, target: str = "sm_90", sets: Sequence[str] = ()) -> ModuleType:
        return module(file, spec, target, tuple(sets))

    return get
