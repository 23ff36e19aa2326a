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
from tests.property.random_specs import accepted, specs

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
