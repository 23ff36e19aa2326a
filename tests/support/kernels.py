"""Kernel files as a build ships them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backends.triton.kernel import KernelFile
from backends.triton.package import FAMILIES, LIBRARIES, kernel_files, kernels_package
from backends.triton.target import TARGETS
from backends.triton.tiles import GemmTile
from compiler.pipeline import compile
from dsl.load import load as load_spec
from tests.support.places import ROOT

COMPILED = [
    *(("deepseek_v3", target) for target in TARGETS),
    ("deepseek_v2_lite", "sm_90"),
    ("deepseek_v3_tiny", "sm_90"),
]
"""What kernels are compiled for: V3 for every target, other sizes and BF16 for one.
`dslc kernels SPEC --target T` checks any other pair by the same rules."""


FILES = [family.__name__.rpartition(".")[2] for family in FAMILIES]
"""Every file of kernels that a build may have."""

LIBRARY_FILES = [library.name for library in LIBRARIES]
"""Every file that calls a library."""


KernelLoader = Callable[..., ModuleType]


@cache
def files_of(spec: str, target: str, sets: tuple[str, ...] = ()) -> tuple[KernelFile, ...]:
    """The kernel files of a spec, as its build for a target has them."""
    description = load_spec(ROOT / f"specs/{spec}.yaml", sets=sets)
    return tuple(kernel_files(compile(description).programs, description, TARGETS[target]))


def package_of(spec: str, target: str, sets: tuple[str, ...] = ()) -> dict[str, str]:
    """Texts of the folder `kernels/` of a build."""
    return kernels_package(files_of(spec, target, sets), TARGETS[target])


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def new(*arguments: Any, **keywords: Any) -> Tensor:
        made = empty(*arguments, **keywords)
        return made.fill_(0x7F) if made.dtype is torch.uint8 else made.fill_(torch.nan)

    return new


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agree(found: Tensor, expected: Tensor) -> None:
    """Products are exact; what differs is how sums of float32 and two scales are rounded."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    x, y = found.double(), expected.double()
    assert x.isfinite().all()
    size = (x.square() + y.square()).sum()
    assert size == 0 or 1 - 2 * (x * y).sum() / size < 1e-12
    assert (x - y).abs().max() <= 1e-6 * y.abs().max() if len(x) else True


def as_written(module: ModuleType, tile: GemmTile) -> Any:
    rows, columns, warps, stages, *_, registers = astuple(tile)
    values = (rows, columns, warps, stages, registers)
    return module.Tile(*values[: len(module.Tile._fields)])


COUNTS = [
    (0, 3, 0, 0, 17, 1, 0),  # idle experts at both ends and between
    (130, 0, 255, 1),  # tiles that are not full, tiles of tokens that are just full, or not
    (0, 0, 0),
    (5,),
]


def ends_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def normal_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def is_product(found: Tensor, a: Tensor, b: Tensor) -> None:
    """found is `a b`, rounded once to bfloat16; sums of float32 are off by a little of the sum of
    magnitudes."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * size).all()


def difference(found: Tensor, expected: Tensor) -> float:
    """FlashMLA's measure: 1 - 2 <x, y> / (|x|^2 + |y|^2), in float64."""
    x, y = found.double().flatten(), expected.double().flatten()
    total = float(x @ x + y @ y)
    return 1 - 2 * float(x @ y) / total if total else 0.0


def close(found: Tensor, expected: Tensor, absolute: float, relative: float) -> bool:
    """Each number within one of both bounds, none of them NaN."""
    error = (found.double() - expected.double()).abs()
    return bool(((error <= absolute) | (error <= relative * expected.double().abs())).all())
