"""Captured steps give the bits of steps launched from Python, by a stand-in for CUDA graphs."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
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


BF16 = pytest.mark.parametrize("package", ["bf16"], indirect=True)
FP8 = pytest.mark.parametrize("package", ["fp8_blockwise"], indirect=True)


@pytest.fixture
def part(package: ModuleType) -> Part:
    return lambda name: importlib.import_module(f"{package.__name__}.runtime.{name}")


@pytest.fixture
def graphs(package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """Models are as if on a GPU; the graphs that were captured."""
    as_kernels(monkeypatch, package)
    for name in ("compiled", "train.trainer"):
        monkeypatch.setattr(part(name), "captures", lambda model: True)
    return stand_in(monkeypatch)


def answers(package: ModuleType, part: Part, requests: int, **options: Any) -> list[Any]:
    """Tokens and their log-probabilities, of requests that arrive while others run."""
    rng = random.Random(1)
    model = package.Model(dtype=torch.float32, seed=3)
    request, made = part("serve.request"), part("serve.options").Options(page=4, **options)
    engine = part("serve.engine").Engine(model, made)
    found: list[list[Any]] = [[] for _ in range(requests)]
    waiting = list(range(requests))
    while waiting or engine.busy:
        for i in waiting[: rng.randrange(3)]:
            prompt = [rng.randrange(64) for _ in range(rng.choice([1, 3, 5, 14]))]
            sampling = request.Sampling(
                max_tokens=rng.randrange(10, 30), temperature=i % 2, seed=i, logprobs=2
            )
            engine.add(str(i), prompt, sampling)
            waiting.remove(i)
        for event in engine.step():
            found[int(event.id)] += event.tokens
    return found


@pytest.mark.slow
@BF16
def test_answers(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch, graphs: list[StandInGraph]
) -> None:
    for requests, speculate in ((8, 0), (3, 1)):
        graphs.clear()
        found = answers(package, part, requests, speculate=speculate)
        assert len(graphs) >= 3 and sum(graph.replays for graph in graphs) > 8
        count = len(graphs)
        with monkeypatch.context() as patch:
            patch.setattr(part("compiled"), "captures", lambda model: False)
            assert found == answers(package, part, requests, speculate=speculate)
        assert len(graphs) == count


@pytest.mark.slow
@FP8
def test_weights_that_were_written_to_are_captured_again(
    package: ModuleType, part: Part, graphs: list[StandInGraph]
) -> None:
    """FP8 copies and what else is made of weights once would be those of before."""
    model = package.Model(dtype=torch.float32, seed=3)
    engine = part("serve.engine").Engine(model, part("serve.options").Options(prefix_cache=False))
    asked = [([5, 9, 3], part("serve.request").Sampling(max_tokens=9, logprobs=1))]
    before = engine.generate(asked)
    assert engine.generate(asked) == before and len(graphs) == 1
    other = package.Model(dtype=torch.float32, seed=4)
    model.load_state_dict(other.state_dict())
    after = engine.generate(asked)
    assert after != before and len(graphs) == 2
    assert part("serve.engine").Engine(other).generate(asked) == after


@BF16
def test_a_step_that_waits_is_told_of_once_and_not_captured(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch, graphs: list[StandInGraph]
) -> None:
    finite = part("functional").count_labels

    def waiting(labels: Tensor) -> Tensor:
        assert float(finite(labels)) > 0
        return torch.as_tensor(finite(labels))

    kernels = sys.modules[f"{package.__name__}.kernels"]
    monkeypatch.setattr(kernels.F, "count_labels", staticmethod(waiting))
    with pytest.warns(UserWarning, match=r"waits for the GPU at .*test_graphs.py:\d+: its") as told:
        train(package, part, 3)
    assert len([one for one in told if "waits for the GPU" in str(one.message)]) == 1
    assert not graphs


@BF16
def test_what_cannot_be_captured_is_an_error(part: Part, graphs: list[StandInGraph]) -> None:
    step = part("graphs").Graphs("a step", torch.device("cpu"))
    found = torch.zeros(2)
    calls = iter(range(9))

    def changing() -> Tensor:
        return found + 1 if next(calls) < 2 else found * found.max().item()

    for _ in range(2):
        assert step.run("key", changing).tolist() == [1, 1]
    with pytest.raises(RuntimeError, match=r"a step cannot be captured .*; set DSLC_GRAPHS=off to"):
        step.run("key", changing)


@BF16
def test_who_captures(part: Part, package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = part("graphs")
    model = package.Model(device="meta")
    assert not runtime.captures(model) and not runtime.captures(object())
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    for word, captured in (("", True), ("on", True), ("off", False)):
        runtime.wanted.cache_clear()
        monkeypatch.setenv(runtime.VARIABLE, word)
        assert runtime.captures(model) is captured
    runtime.wanted.cache_clear()
    monkeypatch.setenv(runtime.VARIABLE, "of")
    with pytest.raises(ValueError, match="DSLC_GRAPHS=of: choose on or off"):
        runtime.captures(model)
    runtime.wanted.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "kernels"),
    [("bf16", True), ("fp8_blockwise", True), ("bf16", False)],
    indirect=["package"],
)
def test_what_is_captured_waits_for_nothing(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    """On tensors without memory: with the build's launchers, but for the launches, and by torch."""
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda *grid: lambda *a, **k: None)
    monkeypatch.setattr(part("dispatch"), "serves", lambda target, device: kernels)
    # On a GPU it compares products at their first call.
    monkeypatch.setattr(part("matmul"), "_agreeing_sizes", lambda *operands: (1, 32))
    model = package.Model(device="meta")
    pages = part("pages").Pages(9, 64, model.paged_latent_attention if kernels else None)
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


def train(package: ModuleType, part: Part, steps: int) -> tuple[list[Any], dict[str, Tensor]]:
    """Metrics and weights of some steps of three micro-batches."""
    one = settings(package, part)
    text = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sequences = part("train.sequences").Sequences([text], one.sequence_length, 0)
    model = package.Model(dtype=torch.float32, seed=3)
    trainer = part("train.trainer").Trainer(model, one, sequences)
    metrics = [trainer.step() for _ in range(steps)]
    return metrics, {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.slow
def test_training(
    package: ModuleType, part: Part, monkeypatch: pytest.MonkeyPatch, graphs: list[StandInGraph]
) -> None:
    metrics, weights = train(package, part, 3)
    assert len(graphs) == 1 and graphs[0].replays == 4  # of 9 micro-batches, 3 in the first step
    monkeypatch.setattr(part("train.trainer"), "captures", lambda model: False)
    expected_metrics, expected = train(package, part, 3)
    assert metrics == expected_metrics
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
