"""Fusing behind the gradients: before and after compute the same, bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from compiler.graph.core import Program
from compiler.passes.fuse_casts import _both, _made_and_cast
from compiler.pipeline import PIPELINES, after
from compiler.rewrite import rewrite
from dsl.load import load
from tests.support.models import results
from tests.support.places import TINY

# Halves of whole runs, so that gradients of gate and up are cast where they are made.
SETS = ["precision.policy=fp8_blockwise", "params.moe_intermediate_size=128"]


def program_after(name: str, step: str, *sets: str) -> Program:
    return after(load(TINY, sets=[*SETS, *sets]), name, step)


def kinds(program: Program) -> Counter[str]:
    return Counter(op.kind for graph in program.graphs.values() for op in graph.walk())


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("sets", [(), ("precision.policy=bf16",)])
def test_before_and_after_compute_the_same(name: str, sets: tuple[str, ...]) -> None:
    before, fused = (program_after(name, step, *sets) for step in ("place_fp8", "fuse_casts"))
    assert kinds(before) != kinds(fused) or name == "decode"
    found, expected = results(fused), results(before)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(_bits(one), _bits(other))


def _bits(x: Tensor) -> Tensor:
    return x.nan_to_num() if x.is_floating_point() else x


@pytest.mark.slow
def test_what_becomes_one() -> None:
    sets = ["params.hidden_size=128"]
    before, fused = (kinds(program_after("train", s, *sets)) for s in ("place_fp8", "fuse_casts"))
    gone = {"swiglu", "swiglu_grad", "swiglu_grad_joined", "broadcast", "sum_over"}
    assert not gone & set(fused)
    # Runs of the gradient of both down-projections begin anew inside of it.
    assert fused["quantize_columns"] == 1
    made = {
        "rotate_last": 3,  # queries, again in the backward pass, and their gradients
        "join_rotated": 2,  # keys, again in the backward pass
        "join_rotated_grad": 1,
        "swiglu_quantize": before["swiglu"],
        "swiglu_grad_quantize": before["swiglu_grad"],
        "quantize_both": before["quantize_columns"] - before["swiglu_grad"] - 1,
        "rms_norm_quantize": 4,  # of both latents, again in the backward pass
    }
    assert {kind: fused[kind] for kind in made} == made


def test_a_rule_says_why_it_leaves_an_operator() -> None:
    program = program_after("train", "fuse_layout")
    misses = rewrite(program, "quantize", _made_and_cast) + rewrite(program, "quantize", _both)
    assert {miss.reason for miss in misses} >= {
        "what is cast is no norm and no SwiGLU",
        "what is cast is not cast in runs of tokens next",
    }
