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
from tests.support.random_runs import runs_or_is_refused
from tests.support.random_specs import accepted, few, fitted, specs

COUNTER = itertools.count()


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(specs())
def test_a_random_spec_runs_or_is_refused(spec: dict[str, Any]) -> None:
    runs_or_is_refused(spec)


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
