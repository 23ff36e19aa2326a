"""Small models: their specs, descriptions and built packages."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.build import build
from compiler.graph.core import Program
from dsl.load import Description, load
from tests.interpret import State, random_inputs, random_weights, run
from tests.support.places import TINY

COUNTER = itertools.count()


def description(*sets: str) -> Description:
    return load(TINY, sets=sets)


def model(folder: Path, *sets: str, skip: tuple[str, ...] = ()) -> Any:
    """The built model of the tiny spec in float64, so that only real differences count."""
    name = f"passes_{next(COUNTER)}"
    build(description(*sets), folder / name, skip=skip)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name).Model(dtype=torch.float64, seed=5)
    finally:
        sys.path.remove(str(folder))


def published(model: Any) -> Any:
    """Its tensors by published name, by the `runtime.weights` of its own package."""
    package = type(model).__module__.split(".", 1)[0]
    return importlib.import_module(f"{package}.runtime.weights").published(model)


VARIANTS = [
    (),
    (
        "params.q_lora_rank=0",
        "params.n_shared_experts=0",
        "params.n_group=1",
        "params.topk_group=1",
    ),
    ("params.v_head_dim=12", "params.qk_nope_head_dim=20", "params.moe_intermediate_size=10"),
    ("params.num_attention_heads=3", "params.norm_topk_prob=false", "architecture.mtp.depth=0"),
]


GQA = [
    "blocks=[causal_lm, decoder, gqa, swiglu]",
    "params={vocab_size: 32, hidden_size: 8, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 4, intermediate_size: 8}",
    "architecture={layers: [{repeat: 1, attention: GQA, feed_forward: SwiGLU}]}",
    "train={}",
]


def results(program: Program) -> list[Tensor]:
    """Those of the outermost block, and the gradients of all weights."""
    inputs, weights, state = random_inputs(program), random_weights(program), State()
    found = run(program, inputs, weights, state=state)
    if program.backward:
        seed = {v.name: torch.ones(()) for v in program.graphs[program.backward].args}
        run(program, seed, weights, graph=program.backward, state=state)
        found += [state.grads[name] for name in sorted(state.grads)]
    return found
