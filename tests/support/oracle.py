"""The same model twice: that of transformers, and a built package."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from backends.build import build
from dsl.hf import read_config, spec_from_hf
from dsl.load import load
from dsl.source import Source
from tests.support.configs import Case
from tests.support.reference import Reference


@dataclass(frozen=True)
class Pair:
    """The same model twice, with the same weights, and tokens to run through it."""

    case: Case
    reference: Reference
    package: ModuleType
    model: Any
    checkpoint: Path
    tokens: Tensor
    labels: Tensor

    def member(self, name: str) -> Any:
        """`runtime.cache.Cache` and the like, as the built package has them."""
        module, _, attribute = f"{self.package.__name__}.{name}".rpartition(".")
        return getattr(sys.modules[module], attribute)


def import_package(folder: Path, name: str) -> ModuleType:
    """A built package under its own name, without touching sys.path."""
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name, init, submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build_from_config(config: Path, name: str) -> ModuleType:
    """The package that comes of a `config.json`, by way of a spec beside it."""
    source = Source(str(config), config.read_text())
    spec = config.with_name(f"{name}.yaml")
    spec.write_text(spec_from_hf(read_config(source), source, name))
    package = config.parent / "build" / name
    build(load(spec), package)
    return import_package(package, name)


LOGITS = 1e-5


GRADIENTS = 1e-4


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """RMS of the difference over the RMS of the reference; both zero is no difference."""
    difference, scale = (ours - theirs).norm().item(), theirs.norm().item()
    return difference / scale if scale else difference
