"""Costs of single operators add up to what the summary says of the whole model."""

from __future__ import annotations

from functools import cache

import pytest

from compiler.analysis import Summary, summary, total
from compiler.analysis.costs import Costs
from compiler.pipeline import Compiled, compile
from dsl.load import load
from tests.support.places import SPECS

TOKENS = 4096
SIZES = {"batch": 1, "seq": TOKENS, "context": TOKENS}


@cache
def model(spec: str) -> tuple[Compiled, Summary]:
    compiled = compile(load(SPECS / f"{spec}.yaml"))
    return compiled, summary(compiled.lowered, compiled.programs["decode"])


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["deepseek_v3", "deepseek_v2_lite", "deepseek_v3_tiny"])
def test_operators_add_up_to_the_model(spec: str) -> None:
    compiled, numbers = model(spec)
    decode = compiled.programs["decode"]
    one = {**SIZES, "seq": 1}
    assert Costs(decode).flops(decode.main, one) == total(numbers.decoding_flops)
    forward = compiled.programs["forward"]
    both = total(numbers.training_flops) + total(numbers.mtp_training_flops)
    # The summary divides by the tokens of a sequence, and rounds each share down.
    flops = 3 * Costs(forward).flops(forward.main, SIZES) // TOKENS
    assert 0 <= flops - both < 40
    of_ops = Costs(forward).of(forward.main, SIZES)
    top = [op for op in of_ops if op in forward.main.ops]
    assert sum(of_ops[op].flops for op in top) == Costs(forward).flops(forward.main, SIZES)


def test_numbers_of_one_operator() -> None:
    program = model("deepseek_v3")[0].programs["train"]
    moe = program.graphs["DeepSeekMoE"]
    costs = {op.results[0].name: c for op, c in Costs(program).of(moe, SIZES).items() if op.results}
    slots = TOKENS * 8
    # Numbers in FP8 and a scale for each 128 of them, where experts end, the order.
    assert costs["rows_q"].bytes == slots * (7168 + 56 * 4) + 256 * 4 + slots * 8
    assert costs["down_proj"].flops == 2 * slots * 2048 * 7168
    assert costs["down_proj"].bytes == slots * 7168 * 2
    # The shared expert is a block of its own: the call costs what is in it.
    assert costs["swiglu"].flops == 3 * 2 * TOKENS * 2048 * 7168


def test_how_often_blocks_run() -> None:
    runs = Costs(model("deepseek_v3")[0].programs["forward"]).runs()
    assert runs["CausalLM"] == 1 and runs["MLA"] == 62 and runs["DecoderLayer_DeepSeekMoE"] == 58
