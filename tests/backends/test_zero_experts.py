"""Experts that give back their tokens: in training, balance, decoding, serving, and on ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.analysis.costs import Costs
from compiler.ops import OPS
from compiler.ops.moe import computing
from compiler.pipeline import PIPELINES, after
from tests.support.longcat import CHOSEN, EXPERTS, ZERO, built, small

TOKENS = torch.randint(64, (2, 13), generator=torch.manual_seed(3))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("longcat"), "zero_experts")


@pytest.fixture(scope="module")
def model(package: Any) -> Any:
    return package.Model(dtype=torch.float64, seed=5)


def runtime(package: Any, name: str) -> Any:
    return importlib.import_module(f"{package.__name__}.runtime.{name}")


@pytest.mark.slow
def test_a_loop_over_experts_computes_the_same(model: Any, tmp_path: Path) -> None:
    """Also without the backward pass that the compiler derives; gates are in float32."""
    skip = ("fuse_experts", "differentiate")
    plain = built(tmp_path, "zero_experts_loop", skip=skip).Model(dtype=torch.float64, seed=5)
    losses = [m.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total for m in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-7)
    for loss in losses:
        loss.backward()
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_loads_and_the_bias_that_balances_them_are_of_all_experts(package: Any) -> None:
    model = package.Model(dtype=torch.float32, seed=5)
    loads = model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).load
    (load,) = loads
    assert load.shape == (2, EXPERTS + ZERO)
    assert load.sum(-1).tolist() == [24 * CHOSEN] * 2 and load[:, EXPERTS:].all()
    balance = runtime(package, "train.balance").Balance(model)
    balance.add(loads)
    found = balance.finish(0.001)
    assert [len(use.load) for use in found.values()] == [EXPERTS + ZERO] * 2
    for layer, counts in zip(model.model.layers, load, strict=True):
        mean = counts.sum() / len(counts)
        moved = torch.where(counts < mean, 0.001, torch.where(counts > mean, -0.001, 0.0))
        torch.testing.assert_close(layer.mlp.router.e_score_correction_bias, moved)


def test_an_engine_serves_it_and_counts_the_rows_of_experts_that_compute(
    package: Any, tmp_path: Path
) -> None:
    """A row is where its expert is; the tokens that are given back go nowhere."""
    model = package.Model(dtype=torch.float32, seed=5)
    whole = model(TOKENS).logits
    text = model.generate(TOKENS[:, :5], max_new_tokens=8, temperature=0, eos_token_id=None)
    scores = model(text[:, :-1]).logits[:, 4:].argmax(-1)
    assert scores.tolist() == text[:, 5:].tolist()
    spread = runtime(package, "serve.spread")
    model.save(tmp_path)
    loaded = package.Model(device="meta", dtype=torch.float32)
    layers = spread.spread(loaded, None, spread.Balancing())
    runtime(package, "checkpoint").load(loaded, tmp_path, whole=package.Model(device="meta"))
    torch.testing.assert_close(loaded(TOKENS).logits, whole)
    taken = [layer.take_load() for layer in layers]
    chosen = [int(one.sum()) for one in taken]
    assert all(len(one) == EXPERTS for one in taken)
    assert all(0 < count < TOKENS.numel() * CHOSEN for count in chosen)


@pytest.mark.slow
def test_in_fp8_it_computes_about_the_same(model: Any, tmp_path: Path) -> None:
    """Tokens are quantized before they are sorted, and the sum with the token itself is not."""
    fp8 = built(tmp_path, "zero_experts_fp8", "precision.policy=fp8_blockwise").Model(seed=5)
    assert "permute_quantized_local" in (tmp_path / "zero_experts_fp8" / "model.py").read_text()
    mine = fp8.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    mine.total.backward()
    expected = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    assert mine.main.item() == pytest.approx(expected.main.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fp8.parameters())


def test_choices_that_fall_on_experts_that_compute_are_counted() -> None:
    """4 of 6 + 3: FLOPs and slots are those of 2.67 experts for each token."""
    program = after(small(), "train", PIPELINES["train"][-1].name)
    graph = program.graphs["ZeroExpertMoE"]
    costs = Costs(program).of(graph, {"batch": 3, "seq": 6})
    flops = {op.kind: cost.flops for op, cost in costs.items()}
    slots = 18 * CHOSEN * EXPERTS // (EXPERTS + ZERO)
    assert flops["grouped_linear"] == 2 * slots * 24 * 32
    (permute,) = (op for op in graph.walk() if op.kind == "permute")
    assert computing(permute, CHOSEN) == 3
    assert OPS["identity_weight"].cheap
