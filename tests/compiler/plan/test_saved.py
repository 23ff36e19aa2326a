"""What is saved for the backward pass, counted by hand for a layer of V3."""

from __future__ import annotations

import pytest

from compiler.parallel.layout import units
from compiler.pipeline import compile
from compiler.plan.arrived import spread
from compiler.plan.make import planner_of
from compiler.plan.saved import activations
from compiler.plan.traffic import exchanges
from dsl.load import load
from dslc.specs import shipped
from tests.support.planners import planner

TOKENS = 4096
SIZES = {"batch": 1, "seq": TOKENS, "context": TOKENS}
# Bytes of a token in a layer with experts: two residuals, both latents, the result of attention,
# scores of the gate; the shared expert's gate and up; input, gate and up of eight routed experts.
RESIDUALS, LATENTS, SCORES, SHARED = 2 * 2 * 7168, 2 * (1536 + 576), 4 * 256, 2 * 2 * 2048
ATTENTION, ROWS, GATE_UP = 128 * 128, 8 * 7168, 8 * 2 * 2048
# Attention in 12 bits, gate and up in FP8, each with a scale for 128, as the spec says, in whatever
# precision products are.
FORMATS = ATTENTION * 3 // 2 + GATE_UP + 4 * (ATTENTION + GATE_UP) // 128
# Sums of softmax, rotary tables, numbers and weights of experts; how many each expert has.
SMALL = 2 * 1024


def saved_bytes(layer: int, policy: str) -> int:
    """Bytes for a token."""
    made, _ = planner("deepseek_v3", policy=policy)
    unit = next(unit for unit in units(made.train.main) if unit.layer == layer)
    return activations(made.train, unit, SIZES).bytes // TOKENS


def test_a_layer_in_bf16() -> None:
    expected = RESIDUALS + LATENTS + SCORES + SHARED + 2 * ROWS + FORMATS
    assert 0 <= saved_bytes(5, "bf16") - expected < SMALL


@pytest.mark.slow
def test_a_layer_in_fp8_saves_the_inputs_of_experts_in_fp8() -> None:
    expected = RESIDUALS + LATENTS + SCORES + SHARED + ROWS + 4 * ROWS // 128 + FORMATS
    assert 0 <= saved_bytes(5, "fp8_blockwise") - expected < SMALL


def test_a_dense_layer_has_no_experts() -> None:
    attention = ATTENTION * 3 // 2 + 4 * ATTENTION // 128
    expected = RESIDUALS + LATENTS + attention + 2 * 2 * 18432
    assert 0 <= saved_bytes(0, "bf16") - expected < SMALL


@pytest.mark.slow
def test_if_it_saved_the_outputs_of_experts_v3_would_not_fit() -> None:
    description = load(shipped()["deepseek_v3"], sets=["train.saved_bytes_per_token=25M"])
    made, parallel = planner_of(description, compile(description)), description.spec.parallel
    assert parallel is not None
    plan = made.plan(parallel)
    assert not plan.fits
    largest = plan.fullest.memory.largest()[0]
    outputs = TOKENS * 8 * 7168 * 2 * 4 * 15  # of 4 layers, for 15 micro-batches
    assert (largest.kind.value, largest.bytes) == ("activations", outputs)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp8_blockwise"])
def test_what_is_saved_grows_with_the_tokens(policy: str) -> None:
    parallel = "{cluster: cpu_2x2, batch: 4, sequence_length: 16}"
    made, _ = planner("deepseek_v3_tiny", parallel, policy)
    for unit in units(made.train.main):
        if unit.layer is None:
            continue
        one, two, three = (
            activations(made.train, unit, {"batch": n, "seq": 16, "context": 16}) for n in (1, 2, 3)
        )
        # A few things have one size for any number of tokens, such as the loads of experts.
        assert two.bytes - one.bytes == three.bytes - two.bytes > 9 * one.bytes // 10
        steps = (two.working.bytes - one.working.bytes, three.working.bytes - two.working.bytes)
        assert steps[0] == steps[1] > 9 * one.working.bytes // 10


@pytest.mark.slow
def test_without_derived_gradients_everything_counts_as_saved() -> None:
    description = load(shipped()["deepseek_v3"])
    whole, skipped = (compile(description, skip=skip) for skip in ((), ("differentiate",)))
    assert not skipped.programs["train"].backward
    sums = []
    for compiled in (whole, skipped):
        train = compiled.programs["train"]
        unit = next(unit for unit in units(train.main) if unit.layer == 5)
        sums.append(activations(train, unit, SIZES).bytes)
    assert 2 * sums[0] < sums[1]


def test_products_of_a_dense_layer_wait_with_all_that_they_read() -> None:
    """Of attention: its result, keys and values, queries and both latents together, with the
    gradient of each product's other side; and of the feed-forward network as much."""
    made, _ = planner("deepseek_v3", policy="bf16")
    unit = units(made.train.main)[1]
    attention = (7168 + 128 * 128) + (128 * 256 + 512) + (128 * 192 + 1536) + (2112 + 7168)
    expected = 2 * (attention + (7168 + 18432) + (2 * 18432 + 7168))
    assert activations(made.train, unit, SIZES).operands == expected * TOKENS


@pytest.mark.slow
def test_a_rank_fills_up_rows_of_its_own_experts_alone() -> None:
    made, parallel = planner("deepseek_v3")
    unit = next(unit for unit in units(made.program.main) if unit.layer == 5)
    costs = made._of_a_micro_batch(1, TOKENS).saved[unit.ops]
    layout = made.layout(parallel)
    on_rank = spread(costs, exchanges(made.program, unit, layout), layout.mesh, TOKENS)
    # In FP8, with scales: inputs and gradients of both products of 8 experts for each token, and a
    # tile of 128 more for each of 256 experts, or of 4.
    row = (7168 + 2048 + 4096 + 7168) * 33 // 32
    assert (costs.filling, on_rank.filling) == (256 * 128 * row, 4 * 128 * row)
    assert costs.operands - on_rank.operands == 252 * 128 * row
    assert on_rank.operands > 8 * TOKENS * row
