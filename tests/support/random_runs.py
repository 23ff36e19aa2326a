"""A random spec to the end: built, scored, trained for a step, and continued; or refused."""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from backends.build import build
from tests.support.random_specs import accepted

COUNTER = itertools.count()


def runs_or_is_refused(spec: dict[str, Any]) -> bool:
    """Whether the spec is accepted; then its model runs. Any other outcome is an error."""
    name = f"random_{next(COUNTER)}"
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        made = accepted(spec, folder, name, lambda one: build(one, folder / name))
        if made is None:
            return False
        sys.path.insert(0, text)
        try:
            runs(importlib.import_module(name), spec)
        finally:
            sys.path.remove(text)
            for module in [m for m in sys.modules if m.split(".")[0] == name]:
                del sys.modules[module]
    return True


def runs(module: Any, spec: dict[str, Any]) -> None:
    """Scores and gradients are finite; text is continued, in float32 as without a cache."""
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
