"""Kernels as a build ships them, imported from their files and interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from backends.triton.kernel import KernelFile
from backends.triton.launches import load
from backends.triton.package import FAMILIES, kernel_files, kernels_package
from backends.triton.target import TARGETS
from compiler.pipeline import compile
from dsl.load import load as load_spec
from tests.kernels.interpreter import repair

ROOT = Path(__file__).parents[2]

SPECS = ("deepseek_v3", "deepseek_v2_lite", "deepseek_v3_tiny")
"""What kernels are compiled for."""

FILES = [family.__name__.rpartition(".")[2] for family in FAMILIES]
"""Every file that a build may have."""

Kernels = Callable[..., ModuleType]


@cache
def files_of(spec: str, target: str, sets: tuple[str, ...] = ()) -> tuple[KernelFile, ...]:
    """The kernel files of a spec, as its build for a target has them."""
    description = load_spec(ROOT / f"specs/{spec}.yaml", sets=sets)
    return tuple(kernel_files(compile(description).programs, description, TARGETS[target]))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Each GPU in turn: its own file is the one that is interpreted."""
    return str(request.param)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
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


def package_of(spec: str, target: str, sets: tuple[str, ...] = ()) -> dict[str, str]:
    """Texts of the folder `kernels/` of a build."""
    return kernels_package(files_of(spec, target, sets), TARGETS[target])
