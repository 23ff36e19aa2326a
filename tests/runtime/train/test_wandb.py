"""Metrics in Weights & Biases, by a stand-in for its package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.places import TEXT
from tests.support.trained import part


class Fake(ModuleType):
    """What a run uses of `wandb`: `init`, and of its result what is recorded here."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0
        self.refuses = False

    def init(self, **settings: Any) -> Fake:
        if self.refuses:
            raise OSError("no network")
        self.started.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def train(package: Any, out: Path, **more: Any) -> int:
    command = part(package, "command")
    text = out.with_suffix(".txt")
    text.write_bytes(TEXT.read_bytes()[:4000])
    options = command.Options(out=out, data=(text,), device="cpu", wandb="small models", **more)
    status: int = command.train(package.Model, options)
    return status


@pytest.mark.slow
def test_a_run_is_recorded_and_goes_on_as_the_same_one(
    package: Any, tmp_path: Path, wandb: Fake
) -> None:
    assert train(package, tmp_path / "first", save_every=2) == 0
    (started,) = wandb.started
    assert started["project"] == "small models" and started["name"] == "first"
    assert started["config"]["train.batch"] and started["config"]["seed"] == 0
    assert ("*", "step") in wandb.axes and wandb.finished == 1
    records = (tmp_path / "first" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [one for one in map(json.loads, records) if "main" in one]
    shown = [one for one in wandb.logged if "main" in one]
    assert [(one["step"], one["main"]) for one in shown] == [
        (one["step"], one["main"]) for one in steps
    ]
    assert any("held_out/loss" in one for one in wandb.logged)
    # Its last steps are lost, and trained again by the same run.
    for folder in sorted((tmp_path / "first" / "checkpoints").iterdir())[1:]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
    assert train(package, tmp_path / "first") == 0
    first, second = wandb.started
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert train(package, tmp_path / "other") == 0
    assert wandb.started[2]["id"] != first["id"]


def test_what_is_missing_is_said_before_anything_is_made(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = part(package, "settings").TrainError
    with pytest.raises(error, match="--wandb needs the package wandb: pip install wandb"):
        train(package, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_service_that_does_not_answer_ends_the_run(
    package: Any, tmp_path: Path, wandb: Fake
) -> None:
    wandb.refuses = True
    error = part(package, "settings").TrainError
    with pytest.raises(error, match="--wandb small models: Weights & Biases: no network"):
        train(package, tmp_path / "run")
