"""Every block in float32: its derived gradients against torch's autograd of the unfused graph."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from compiler.graph.core import Program
from compiler.pipeline import PIPELINES, compile
from dsl.load import load
from tests.interpret import State, random_inputs, random_weights, run
from tests.support.places import TINY

# Every block that is shipped, once.
SETS = (
    "blocks=[causal_lm, decoder, mla, gqa, mha, swiglu, deepseek_moe, softmax_moe, mtp]",
    "params.num_key_value_heads=2",
    "params.head_dim=8",
    "params.intermediate_size=192",
    "architecture={layers: [{repeat: 1, attention: MLA, feed_forward: SwiGLU}, "
    "{repeat: 2, attention: GQA, feed_forward: DeepSeekMoE}, "
    "{repeat: 1, attention: MHA, feed_forward: SoftmaxMoE}], "
    "mtp: {depth: 1, attention: MLA, feed_forward: DeepSeekMoE}}",
)
# Passes that keep what blocks take and give, so that one can be held against the other.
PLAIN = ("select_outputs", "drop_cache", "simplify", "hoist")


BLOCKS = (
    "MLA", "GQA", "MHA", "SwiGLU_192", "SwiGLU_32", "DeepSeekMoE", "SoftmaxMoE",
    "DecoderLayer_MLA_SwiGLU", "DecoderLayer_GQA_DeepSeekMoE",
    "DecoderLayer_MHA_SoftmaxMoE", "MTP",
)  # fmt: skip


@cache
def train(plain: bool) -> Program:
    skip = {one.name for one in PIPELINES["train"]} - set(PLAIN) if plain else ()
    return compile(load(TINY, sets=SETS), skip=skip).programs["train"]


def test_every_block_is_tested() -> None:
    program = train(plain=True)
    assert set(BLOCKS) == program.graphs.keys() - {program.root}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_a_block(name: str) -> None:
    """Within 1e-5 of the largest, where the truth is computed in float64."""
    program, unfused = train(plain=False), train(plain=True)
    graph, backward = program.graphs[name], program.backward_of(name)
    assert backward is not None
    assert [v.name for v in graph.args] == [v.name for v in unfused.graphs[name].args]
    inputs = random_inputs(unfused, graph=name)
    weights = random_weights(unfused, graph=name)
    state = State()
    results = run(program, inputs, weights, graph=name, state=state)

    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    leaves = {n: t.requires_grad_() for n, t in wide.items() if n in backward.result_names}
    parameters = {n: t.double().requires_grad_() for n, t in weights.items()}
    truth = run(unfused, wide, parameters, graph=name, dtype=torch.float64)
    assert len(truth) == len(results)
    moving = {id(t): t for t in truth if t.requires_grad}
    seeds = [torch.randn(t.shape, generator=torch.manual_seed(0)) for t in moving.values()]
    expected = torch.autograd.grad(
        [*moving.values()], [*leaves.values(), *parameters.values()], seeds, allow_unused=True
    )

    # What the forward graph was given may be handed to the backward graph again.
    left = iter(seeds)
    given = {v.name: inputs[v.name] if v.name in inputs else next(left) for v in backward.args}
    found = run(program, given, weights, graph=backward.name, state=state)
    by_name = dict(zip(backward.result_names, found, strict=True)) | state.grads
    for leaf, gradient in zip([*leaves, *parameters], expected, strict=True):
        if gradient is None:
            assert leaf not in by_name
        else:
            close(by_name[leaf], gradient, leaf)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max(), what
