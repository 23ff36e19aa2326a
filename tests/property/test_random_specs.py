"""Any spec either builds to a module that runs, or is refused with diagnostics: nothing between."""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from backends.build import build
from dsl.load import Description
from tests.support.cases import Case, close
from tests.support.random_specs import accepted, few, fitted, specs

COUNTER = itertools.count()


def built(spec: dict[str, Any], folder: Path) -> Any:
    """The module of a spec; None if the spec is refused."""
    name = f"random_{next(COUNTER)}"
    made = accepted(spec, folder, name, lambda description: build(description, folder / name))
    return importlib.import_module(name) if made is not None else None


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(specs())
def test_a_random_spec_runs_or_is_refused(spec: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        try:
            module = built(spec, Path(folder))
            if module is not None:
                runs(module, spec)
        finally:
            sys.path.remove(folder)


@pytest.mark.slow
@few(4)
@given(specs().map(fitted))
def test_generated_code_computes_what_the_graph_means(spec: dict[str, Any]) -> None:
    """Scores, loss and all gradients in float64, against autograd through the lowered graph."""
    spec = {**spec, "policy": "fp32"}  # of bf16 it is always float32 that gates are computed in
    with tempfile.TemporaryDirectory() as folder:
        name = f"random_{next(COUNTER)}"

        def use(description: Description) -> Case:
            build(description, Path(folder) / name)
            return Case(description)

        case = accepted(spec, Path(folder), name, use)
        assert case, "refused"
        sys.path.insert(0, folder)
        try:
            model = importlib.import_module(name).Model(dtype=torch.float64)
            published = importlib.import_module(f"{name}.runtime.weights").published
        finally:
            sys.path.remove(folder)
    # A gate's bias is float32 in any model.
    case.weights = {n: weight.float().double() for n, weight in case.weights.items()}
    copies = {copy: case.weights[original] for copy, original in case.lowered.aliases.items()}
    model.load_state_dict({**case.weights, **copies})
    numbers = {"mtp_weight": 0.3, "balance_alpha": float(spec["alpha"])}
    for argument, number in numbers.items():
        case.inputs[argument] = torch.tensor(number, dtype=torch.float64)
    tokens, labels = case.inputs["tokens"], case.inputs["labels"]
    expected, gradients = case.observe(case.lowered), case.gradients(case.lowered)
    close(model(tokens).logits, expected["logits 0"], "logits")
    loss = model.loss(tokens, labels)
    loss.total.backward()
    close(loss.total, expected["total 0"], "total")
    for part in published(model):
        zeros = torch.zeros(part.shape, dtype=torch.float64)
        grad = zeros if part.grad is None else part.grad
        close(grad, gradients.get(part.name, zeros), f"gradient of {part.name}")


def runs(module: Any, spec: dict[str, Any]) -> None:
    model = module.Model(seed=3)
    tokens = torch.randint(17, (2, 9), generator=torch.manual_seed(0))
    out = model(tokens)
    assert out.logits.isfinite().all() and len(out.mtp_logits) == spec["mtp"]["depth"]
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.total.backward()
    assert loss.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    text = model.generate(tokens[:, :3], 4, eos_token_id=None)
    assert text.shape == (2, 7)
    if spec["policy"] == "fp32":
        again = tokens[:, :3]
        for _ in range(4):
            scores = model(again).logits[:, -1]
            again = torch.cat([again, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(text, again)
