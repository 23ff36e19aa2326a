"""Each case once: the model of transformers, and the one that dslc builds from its files."""

from __future__ import annotations

import zlib

import pytest
import torch

from tests.support.configs import CASES, Case
from tests.support.oracle import Pair, build_from_config
from tests.support.reference import Reference


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
