"""What is kept for the backward pass, counted by hand for a layer of V3."""

from __future__ import annotations

import pytest

from compiler.plan.kept import activations
from compiler.plan.layout import Unit
from tests.compiler.plan.planners import planner

TOKENS = 4096
SIZES = {"batch": 1, "seq": TOKENS, "context": TOKENS}
# Bytes of a token in a layer with experts: two residuals, both latents, the result of attention,
# scores of the gate; the shared expert's gate and up; input, gate and up of eight routed experts.
RESIDUALS, LATENTS, SCORES, SHARED = 2 * 2 * 7168, 2 * (1536 + 576), 4 * 256, 2 * 2 * 2048
ATTENTION, ROUTED = 128 * 128, 8 * (7168 + 2 * 2048)


def kept(layer: int, *, fp8: bool) -> dict[str, int]:
    made, _ = planner("deepseek_v3")
    unit = next(unit for unit in made.units if unit.layer == layer)
    found = activations(made.program, unit, SIZES, fp8=fp8)
    return {f"{one.block}.{one.name}": one.bytes for one in found.kept}


def test_a_layer_in_bf16() -> None:
    expected = RESIDUALS + LATENTS + SCORES + SHARED + 2 * (ATTENTION + ROUTED)
    assert sum(kept(5, fp8=False).values()) == TOKENS * expected


def test_a_layer_in_fp8_keeps_the_inputs_of_experts_in_fp8_and_that_of_o_proj_in_12_bits() -> None:
    scales = 4 * (ATTENTION + ROUTED) // 128
    expected = RESIDUALS + LATENTS + SCORES + SHARED + ATTENTION * 3 // 2 + ROUTED + scales
    assert sum(kept(5, fp8=True).values()) == TOKENS * expected


def test_a_dense_layer_has_no_experts() -> None:
    dense = RESIDUALS + LATENTS + 2 * ATTENTION + 2 * 2 * 18432
    assert sum(kept(0, fp8=False).values()) == TOKENS * dense


def test_norms_swiglu_and_up_projections_are_computed_again() -> None:
    names = {name.split(".")[1] for name in kept(5, fp8=False)}
    assert not names & {"c_q_2", "c_kv_3", "q", "kv", "k", "mul", "input_layernorm", "y"}
    assert {"c_q", "c_kv", "o", "gate_proj", "up"} <= names


@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_kept_grows_with_the_tokens(fp8: bool) -> None:
    made, _ = planner("deepseek_v3_tiny", "{cluster: cpu_2x2, batch: 4, sequence_length: 16}")
    for unit in made.units:
        if unit.layer is None:
            continue
        one, two = (
            activations(made.program, unit, {"batch": n, "seq": 16, "context": 16}, fp8=fp8)
            for n in (1, 2)
        )
        assert two.bytes == 2 * one.bytes > 0
        # The balance loss is one number, however many tokens there are.
        assert 0 < 2 * one.working.bytes - two.working.bytes <= 8 or (
            two.working.bytes == 2 * one.working.bytes > 0
        )


def test_embedding_alone_keeps_nothing() -> None:
    made, _ = planner("deepseek_v3")
    assert made.units[0] == Unit(range(0, 1))
    assert activations(made.program, made.units[0], SIZES, fp8=False).bytes == 0
