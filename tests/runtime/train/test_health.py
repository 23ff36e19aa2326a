"""What a person is told of that is no error."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from runtime.config import Phase, Schedule, freeze
from runtime.train.balance import utilization
from runtime.train.health import WINDOW, HealthMonitor
from runtime.train.metrics import FILE, Metrics
from runtime.train.trainer import StepMetrics
from tests.support.trained import curve

LOSS = {"mtp_weight": Schedule((Phase(0.3, until=1000), Phase(0.0))), "balance_alpha": 1e-4}
CONFIG = freeze({"train": {"loss": LOSS}})


def step(number: int, load: list[int], mtp: float = 1.0, balance: float = 1.0) -> StepMetrics:
    experts = {"layers.1.mlp": utilization(torch.tensor(load), None)}
    return StepMetrics(number, 10 * number, 2, 2.0, 1.0, (mtp,), balance, 1e-3, 1e-3, 0.5, experts)


def test_dead_and_overloaded_experts_are_told_once() -> None:
    monitor = HealthMonitor(CONFIG)
    load = [5] * 16
    load[3], load[7] = 0, 100
    told = [text for n in range(1, 3 * WINDOW) for text in monitor.warnings(step(n, load))]
    assert told == [
        f"layers.1.mlp: expert 3 is dead: no token in {WINDOW} steps",
        "layers.1.mlp: expert 7 has over 8 times the mean load",
    ]


def test_an_expert_that_has_a_token_now_and_then_is_alive() -> None:
    monitor = HealthMonitor(CONFIG)
    for n in range(1, 2 * WINDOW):
        assert not monitor.warnings(step(n, [5, 5 if n % (WINDOW - 1) == 0 else 0, 5]))


def test_parts_of_the_loss_that_are_zero_though_their_weight_is_not() -> None:
    monitor = HealthMonitor(CONFIG)
    assert monitor.warnings(step(1, [5, 5], mtp=0.0)) == [
        "the loss of MTP depth 1 is 0, though mtp_weight is not"
    ]
    (told,) = monitor.warnings(step(2, [5, 5], balance=0.0))
    assert "the balance loss is 0" in told
    assert not monitor.warnings(step(3, [5, 5], mtp=0.0, balance=0.0))
    # After 1,000 tokens MTP has no weight, and may be what it likes.
    assert not HealthMonitor(CONFIG).warnings(step(101, [5, 5], mtp=0.0))


def test_metrics_go_on_after_a_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for n in range(1, 13):
        metrics.step(step(n, [1, 2]), 0.5)
    metrics.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 13, "to')  # a process was killed
    metrics = Metrics(tmp_path, 10)
    metrics.add({"step": 11, "warning": "new"})
    metrics.close()
    found = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in found] == [*range(1, 11), 11]
    assert "warning" in found[-1]
    loads = [line["step"] for line in found[:-1] if "load" in line["experts"]["layers.1.mlp"]]
    assert loads == [1, 10]


def test_tensorboard_reads_what_was_recorded_and_not_what_was_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for n in range(1, 5):
        metrics.step(step(n, [1, 3], mtp=n), 0.5)
    metrics.add({"step": 4, "held_out": {"loss": 1.5, "acceptance": (0.75, 0.5)}})
    metrics.close()
    time.sleep(1)  # TensorBoard reads its files in the order of the seconds in their names
    metrics = Metrics(tmp_path, 2)  # goes on from an earlier checkpoint
    metrics.step(step(3, [1, 1], mtp=30), 0.5)
    metrics.add({"step": 3, "held_out": {"loss": 2.5, "acceptance": (0.25, 0.5)}})
    metrics.close()
    assert curve(tmp_path, "mtp/1") == {1: 1.0, 2: 2.0, 3: 30.0}
    assert curve(tmp_path, "experts/layers.1.mlp/max_vio") == {1: 0.5, 2: 0.5, 3: 0.0}
    assert curve(tmp_path, "held_out/loss") == {3: 2.5}
    assert curve(tmp_path, "held_out/acceptance/1") == {3: 0.25}
