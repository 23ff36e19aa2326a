"""Memory that runs out is told as that, before it does where that can be computed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.train.memory import memory_of, shortage, training_bytes
from tests.support.places import TEXT
from tests.support.tiny import Model
from tests.support.trained import built, part

CPU = torch.device("cpu")
HUGE = 1 << 50


@pytest.mark.parametrize(
    "ask",
    [lambda: torch.empty(HUGE), lambda: torch.zeros(8).repeat(HUGE), lambda: bytearray(1 << 62)],
)
def test_every_way_of_running_out_is_recognized(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        ask()
    told = shortage(raised.value)
    assert told is not None and told.startswith("out of memory") and "\n" not in told


def test_sizes_are_told_in_one_unit() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(HUGE, dtype=torch.uint8)
    assert shortage(raised.value) == "out of memory: 1,125,899.91 GB more could not be allocated"
    assert shortage(OSError(errno.ENOMEM, "Cannot allocate memory")) == "out of memory"


@pytest.mark.parametrize(
    "other", [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(errno.EIO, "x")]
)
def test_other_errors_stay_what_they_are(other: Exception) -> None:
    assert shortage(other) is None


def test_what_training_needs_is_what_it_holds() -> None:
    model = Model(seed=1)  # BF16, but for what a block declares as float32
    expected = 0
    for weight in model.parameters():
        held = [weight]
        if weight.requires_grad:
            moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
            gradient = torch.zeros(weight.shape)
            masters = [] if weight.dtype == torch.float32 else [weight.float()]
            held += [*moments, gradient, *masters]
        expected += sum(tensor.nbytes for tensor in held)
    assert training_bytes(Model) == expected


def test_the_memory_of_the_cpu_is_that_of_machine_container_and_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"/proc/meminfo": "MemTotal:   1000 kB\nSwapTotal:   24 kB\n"}
    monkeypatch.setattr("runtime.train.memory._text", lambda path: files.get(path, ""))
    monkeypatch.setattr("resource.getrlimit", lambda kind: (-1, -1))
    assert memory_of(CPU) == 1024 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory_of(CPU) == 1024 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert memory_of(CPU) == 5000
    monkeypatch.setattr("resource.getrlimit", lambda kind: (4000, 9000))
    assert memory_of(CPU) == 4000


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("hungry"), "tiny_hungry", train__steps="2")


def train(package: Any, out: Path) -> int:
    text = out.parent / "text.txt"
    text.write_bytes(TEXT.read_bytes()[:3000])
    words = ["--out", str(out), "--data", str(text), "--save-every", "1"]
    status: int = part(package, "command").main(package.Model, words)
    return status


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(
    package: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = part(package, "memory")
    needed = memory.training_bytes(package.Model)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    assert train(package, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: tiny_hungry needs 0.0 GB for weights, gradients and optimizer")
    assert "by the section `parallel` of its spec" in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("[!.]*"))
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    assert train(package, tmp_path / "run") == 0


def test_memory_that_runs_out_later_leaves_a_run_that_goes_on(
    package: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = part(package, "trainer").Trainer
    step = trainer.step

    def hungry(self: Any) -> Any:
        return step(self) if self.position.steps < 1 else torch.empty(HUGE)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "step", hungry)
        assert train(package, tmp_path / "run") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory: ") and "lower train.micro_batch" in error
    assert error.endswith("run resumes from its newest checkpoint")
    assert train(package, tmp_path / "run") == 0
    assert "step-00000001, " in capsys.readouterr().err
