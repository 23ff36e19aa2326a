"""Which device a run trains on; what GPUs compute is not tested here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.train.device import random_state, select_device, set_random_state
from runtime.train.settings import TrainError
from tests.support.trained import part

current: list[int] = []


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if torch saw two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return monkeypatch


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device(None) == select_device("cpu") == torch.device("cpu")
    for name, message in [
        ("cuda", "--device cuda: torch finds no GPU"),
        ("meta", "--device meta cannot train: use cpu, cuda or cuda:N"),
        ("gpu", "--device gpu cannot train"),
    ]:
        with pytest.raises(TrainError, match=message):
            select_device(name)


def test_a_process_has_one_gpu_and_each_rank_its_own(gpus: pytest.MonkeyPatch) -> None:
    assert select_device(None) == select_device("cuda") == torch.device("cuda:0")
    assert select_device("cuda:1") == torch.device("cuda:1")
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainError, match="there is no cuda:2: torch finds 2"):
        select_device("cuda:2")
    gpus.setenv("WORLD_SIZE", "3")
    gpus.setenv("LOCAL_RANK", "1")
    assert select_device(None) == select_device("cuda") == torch.device("cuda:1")
    assert current[-1] == 1
    with pytest.raises(TrainError, match="--device cuda:0 would be the device of all ranks"):
        select_device("cuda:0")
    gpus.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainError, match="there is no cuda:2: torch finds 2"):
        select_device("cuda")


def test_random_state_is_that_of_the_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"cuda:1": torch.arange(5, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: drawn[str(device)])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: drawn.update({str(device): state})
    )
    device = torch.device("cuda:1")
    values = random_state(device)
    assert random_state(torch.device("cpu")).keys() == {"random"}
    drawn["cuda:1"] = torch.zeros(5, dtype=torch.uint8)
    expected = torch.rand(3)
    set_random_state(device, values)
    assert torch.equal(torch.rand(3), expected)
    assert drawn["cuda:1"].tolist() == [0, 1, 2, 3, 4]


def test_a_run_without_its_device_does_not_begin(
    package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path / "run"), "--data", "nowhere.txt", "--device", "gpu"]
    assert part(package, "command").main(package.Model, words) == 1
    assert "--device gpu cannot train" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
