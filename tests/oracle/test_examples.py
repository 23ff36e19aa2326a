"""Blocks of specs/examples against plain torch: scores, gradients, and decoding with a cache."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_f

from backends.build import build
from dsl.load import load
from tests.support.models import published
from tests.support.places import SPECS

COUNTER = itertools.count()
BATCH, SEQ = 2, 9


def built(name: str, folder: Path) -> Any:
    """A model of specs/examples in float64, with weights large enough to matter."""
    package = f"{name}_{next(COUNTER)}"
    sets = ("architecture.mtp.depth=0", "train.loss.balance_alpha=0")  # the loss is that of scores
    build(load(SPECS / "examples" / f"{name}.yaml", sets=sets), folder / package)
    sys.path.insert(0, str(folder))
    try:
        model = importlib.import_module(package).Model(dtype=torch.float64, seed=3)
    finally:
        sys.path.remove(str(folder))
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for one in published(model):
            noise = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            one.take(one.tensor + 0.2 * noise)
    return model


# ---- references: of the published weights of a block, by name, and its input -------------------

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch_f.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def swiglu(w: Weights, x: Tensor, at: str = "") -> Tensor:
    hidden = torch_f.silu(linear(w, f"{at}gate_proj", x)) * linear(w, f"{at}up_proj", x)
    return linear(w, f"{at}down_proj", hidden)


def gated_shared_moe(w: Weights, x: Tensor) -> Tensor:
    score = torch.softmax(linear(w, "gate", x), -1)
    chosen = score.topk(4, -1).indices
    y = torch.sigmoid(linear(w, "shared_expert_gate", x)) * swiglu(w, x, "shared_expert.")
    for e in range(score.shape[-1]):
        weight = score[..., e] * (chosen == e).any(-1) / score.gather(-1, chosen).sum(-1)
        y = y + weight[..., None] * swiglu(w, x, f"experts.{e}.")
    return y


Reference = Callable[[Weights, Tensor], Tensor]
# What each example puts into its last layer, by place.
REFERENCES: dict[str, dict[str, Reference]] = {
    "gated_shared_moe": {"mlp": gated_shared_moe},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_an_example(name: str, tmp_path: Path) -> None:
    model = built(name, tmp_path)
    tokens = torch.randint(500, (BATCH, SEQ + 1), generator=torch.manual_seed(1))
    blocks_compute_what_torch_does(model, tokens, REFERENCES[name])
    gradients_are_those_of_autograd(model, tokens)
    a_decoder_scores_the_same(model, tokens)


def blocks_compute_what_torch_does(
    model: Any, tokens: Tensor, references: dict[str, Reference]
) -> None:
    """Of what the last layer gives a block, its first result."""
    layer = model.model.layers[-1]
    seen: dict[str, Any] = {}
    for path in references:
        layer.get_submodule(path).register_forward_hook(partial(_note, seen, path))
    model(tokens)
    for path, reference in references.items():
        x, made = seen[path]
        weights = layer.get_submodule(path).state_dict()
        close(made[0] if isinstance(made, tuple) else made, reference(weights, x))


def _note(seen: dict[str, Any], path: str, block: Any, given: Any, made: Any) -> None:
    seen[path] = given[0], made


def gradients_are_those_of_autograd(model: Any, tokens: Tensor) -> None:
    """Of the generated backward pass against torch's through `forward`."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    weights = dict(model.named_parameters())
    loss = torch_f.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(loss, [*weights.values()])
    found = model.loss(inputs, labels)
    found.total.backward()
    close(found.total, loss)
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        assert weight.grad is not None and weight.grad.count_nonzero(), name
        close(weight.grad, gradient)


def a_decoder_scores_the_same(model: Any, tokens: Tensor) -> None:
    """A prompt, and then token by token with a cache, against the whole text at once."""
    cache = importlib.import_module(f"{type(model).__module__.split('.')[0]}.runtime.cache")
    kept, scores = cache.Cache(BATCH, SEQ), model(tokens).logits
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, SEQ))):
        step = model.prefill if end - start > 1 else model.decode
        position = torch.arange(start, end).expand(BATCH, -1)
        close(step(tokens[:, start:end], position, kept), scores[:, end - 1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
