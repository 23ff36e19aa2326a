"""Captured steps give the bits of steps launched from Python, by a stand-in for CUDA graphs."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from backends.build import build
from backends.triton.target import TARGETS
from dsl.load import load
from tests.support.cuda_graphs import StandInGraph, as_kernels, stand_in
from tests.support.host_waits import no_waits
from tests.support.places import TINY
from tests.support.trained import SETTINGS

Part = Callable[[str], Any]
"""A module of the package's own `runtime`."""


@pytest.fixture(scope="module", params=["bf16", "fp8_blockwise"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A tiny V3 built for a GPU, in each precision."""
    name, folder = f"graphs_{request.param}", tmp_path_factory.mktemp("built")
    values = {**SETTINGS, "precision.policy": request.param, "model": name}
    sets = [f"{path}={value}" for path, value in values.items()]
    build(load(TINY, sets=sets), folder / name, target=TARGETS["sm_90"])
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def part(package: ModuleType) -> Part:
    return lambda name: importlib.import_module(f"{package.__name__}.runtime.{name}")


@pytest.fixture
def graphs(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch
) -> list[StandInGraph]:
    """Models are as if on a GPU; the graphs that were captured."""
    as_kernels(monkeypatch, package)
    for name in ("compiled", "train.trainer"):
        monkeypatch.setattr(part(name), "captures", lambda model: True)
    return stand_in(monkeypatch)


def answers(package: ModuleType, part: Part, seed: int, **options: Any) -> list[Any]:
    """Tokens and their log-probabilities, of requests that arrive while others run."""
    rng = random.Random(seed)
    model = package.Model(dtype=torch.float32, seed=3)
    request, made = part("serve.request"), part("serve.options").Options(page=4, **options)
    engine = part("serve.engine").Engine(model, made)
    found: list[list[Any]] = [[] for _ in range(9)]
    waiting = list(range(9))
    while waiting or engine.busy:
        for i in waiting[: rng.randrange(3)]:
            prompt = [rng.randrange(64) for _ in range(rng.choice([1, 3, 5, 14]))]
            sampling = request.Sampling(
                max_tokens=rng.randrange(10, 40), temperature=i % 2, seed=i, logprobs=2
            )
            engine.add(str(i), prompt, sampling)
            waiting.remove(i)
        for event in engine.step():
            found[int(event.id)] += event.tokens
    return found


@pytest.mark.parametrize("speculate", [0, 1])
def test_answers(
    package: ModuleType,
    part: Part,
    monkeypatch: pytest.MonkeyPatch,
    graphs: list[StandInGraph],
    speculate: int,
) -> None:
    found = answers(package, part, 1, speculate=speculate)
    assert len(graphs) >= 4 and sum(graph.replays for graph in graphs) > 20
    count = len(graphs)
    monkeypatch.setattr(part("compiled"), "captures", lambda model: False)
    assert found == answers(package, part, 1, speculate=speculate)
    assert len(graphs) == count


def test_what_is_captured_waits_for_nothing(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the build's launchers, on tensors without memory; nothing is launched."""
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda *grid: lambda *a, **k: None)
    monkeypatch.setattr(part("dispatch"), "serves", lambda target, device: True)
    # On a GPU it compares products at their first call.
    monkeypatch.setattr(part("matmul"), "_agreeing_sizes", lambda *operands: (1, 32))
    model = package.Model(device="meta")
    pages = part("pages").Pages(9, 64, model.paged_latent_attention)
    answers, place = part("pages").make_rows([([1], 3, 1), ([2, 3], 70, 1)], [0, 1], 64, "meta")
    prompts, places = part("pages").make_rows([([1, 2], 3, 70)], [69], 64, "meta")

    def step(rows: Any, position: Tensor) -> None:
        pages.begin(rows)
        model.decode(tokens_of(position), position, pages)
        model.draft(pages.states, tokens_of(position), position, pages)

    with no_waits(), torch.inference_mode(), part("matmul").batch_invariant():
        step(answers, place)
        step(prompts, places)
    position = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    cache = part("cache").Cache(2, 40)
    with no_waits(), torch.no_grad():
        model.prefill(tokens_of(position), position, cache)
        model.decode(tokens_of(position[:, :1]), position[:, :1], cache)
    trainer = part("train.trainer").Trainer(model, settings(package, part), ())
    tokens, share = position, torch.ones((), dtype=torch.float64, device="meta")
    with no_waits():
        for _ in range(2):
            _, load = trainer._micro_batch(tokens, share, 0)
            trainer.balance.add(load)
        trainer.optimizer.step(1, 1e-3, trainer.optimizer.squares())


def tokens_of(position: Tensor) -> Tensor:
    return torch.zeros_like(position)


def settings(package: ModuleType, part: Part) -> Any:
    return part("train.settings").Settings.of(package.config)


def train(package: ModuleType, part: Part, steps: int) -> tuple[list[Any], dict[str, Tensor], Any]:
    """Metrics and weights of some steps of three micro-batches, and the trainer."""
    one = settings(package, part)
    text = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sequences = part("train.sequences").Sequences([text], one.sequence_length, 0)
    model = package.Model(dtype=torch.float32, seed=3)
    trainer = part("train.trainer").Trainer(model, one, sequences)
    metrics = [trainer.step() for _ in range(steps)]
    return metrics, {name: t.clone() for name, t in model.state_dict().items()}, trainer


def test_training(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch, graphs: list[StandInGraph]
) -> None:
    metrics, weights, trainer = train(package, part, 4)
    assert len(graphs) == 1 and graphs[0].replays == 7  # of 12, 3 in the first step
    monkeypatch.setattr(part("train.trainer"), "captures", lambda model: False)
    expected_metrics, expected, _ = train(package, part, 4)
    assert metrics == expected_metrics
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
