"""A built tiny model to train: small enough that a step takes a tenth of a second."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from backends.build import build
from dsl.load import load
from tests.support.places import TEXT, TINY

SETTINGS = {
    "params.hidden_size": "32",
    "params.moe_intermediate_size": "16",
    "params.n_routed_experts": "8",
    "params.num_experts_per_tok": "2",
    "params.n_group": "2",
    "params.topk_group": "1",
    "architecture.layers.1.repeat": "1",
    "architecture.mtp.depth": "1",
    "train.learning_rate": "3e-3",
    "train.sequence_length": "16",
    "train.batch": "6",
    "train.micro_batch": "2",
    "train.steps": "6",
}

EOS = 32  # the space: words are documents
MASK = {"train__document_mask": "true", "sequence__eos_token_id": str(EOS)}


def built(folder: Path, name: str, only: dict[str, str] | None = None, **changes: str) -> Any:
    """The package `name`, built in `folder` with other values: `train__steps="3"`."""
    values = only or {**SETTINGS, **{path.replace("__", "."): v for path, v in changes.items()}}
    sets = [f"{path}={value}" for path, value in values.items()]
    build(load(TINY, sets=[*sets, f"model={name}"]), folder / name)
    sys.path.insert(0, str(folder))
    try:
        package = importlib.import_module(name)
        importlib.import_module(f"{name}.runtime.train.command")
        return package
    finally:
        sys.path.remove(str(folder))


def part(package: Any, module: str) -> Any:
    """A module of the package's own `runtime.train`."""
    return sys.modules[f"{package.__name__}.runtime.train.{module}"]


def published(package: Any, model: Any) -> Any:
    return sys.modules[f"{package.__name__}.runtime.weights"].published(model)


def trainer(package: Any, group: Any = None, seed: int = 0) -> Any:
    """A trainer of a fresh model on the shipped text."""
    settings = part(package, "settings").Settings.of(package.config)
    text = torch.tensor(list(TEXT.read_bytes()[:20_000]), dtype=torch.uint8)
    sequences = part(package, "sequences").Sequences([text], settings.sequence_length, 0)
    return part(package, "trainer").Trainer(package.Model(seed=seed), settings, sequences, group)


def curve(run: Path, name: str) -> dict[int, float]:
    """What TensorBoard itself shows of a run: the value at each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = events.Scalars(name)
    values = {event.step: event.value for event in found}
    assert len(values) == len(found), "a step is there twice"
    return values


Lines = list[dict[str, Any]]


STEPS = 6


def lines(out: Path) -> Lines:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def content(out: Path, step: int = STEPS) -> dict[str, Any]:
    """What a checkpoint says: its numbers, and the bytes of each tensor."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    found: dict[str, Any] = {"state": json.loads((folder / "state.json").read_text())}
    for file in folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            key = f"{file.parent.name}/{name}"
            found[key] = (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
    assert len(found) > 100
    return found
