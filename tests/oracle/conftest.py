"""Each case once: the model of transformers, and the one that dslc builds from its files."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.build import build
from dsl.hf import read_config, spec_from_hf
from dsl.load import load
from dsl.source import Source
from tests.oracle.configs import CASES, Case
from tests.oracle.reference import Reference


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


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    name = f"oracle_{case.name}"
    seed = zlib.crc32(case.name.encode())
    checkpoint = tmp_path_factory.mktemp(name) / "checkpoint"
    reference = Reference(case, seed)
    reference.save(checkpoint)
    package = build_from_config(checkpoint / "config.json", name)
    model = package.Model(dtype=torch.float32)
    model.load(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, case.config["vocab_size"], (2, 33), generator=generator)
    labels = text[:, 1:].clone()
    labels[0, 4:7] = -100
    return Pair(case, reference, package, model, checkpoint, text[:, :-1], labels)


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
