"""FP8: which products, with which scales, and that the rewritten graph computes just these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.core import Graph, Op, Program
from compiler.graph.text import print_graph
from compiler.graph.verify import spans_missing, verify
from compiler.pipeline import PIPELINES, after
from dsl.load import Description, load
from runtime import fp8
from runtime import functional as F
from tests.conftest import Golden
from tests.interpret import RUN, random_inputs, random_weights, run
from tests.interpret.frame import Frame

SPECS = Path(__file__).parents[3] / "specs"
TINY = SPECS / "deepseek_v3_tiny.yaml"
FP8 = "precision.policy=fp8_blockwise"


def tiny(*sets: str) -> Description:
    return load(TINY, sets=[FP8, "architecture.mtp.depth=1", *sets])


def placed(program: str = "forward", *sets: str) -> Program:
    return after(tiny(*sets), program, "place_fp8")


def named(graph: Graph, kind: str) -> list[Op]:
    return [op for op in graph.walk() if op.kind == kind]


def test_mla_of_v3(golden: Golden) -> None:
    program = after(load(SPECS / "deepseek_v3.yaml"), "forward", "place_fp8")
    golden("passes/place_fp8_mla.graph", print_graph(program.graphs["MLA"]))


@pytest.mark.parametrize("program", PIPELINES)
def test_every_program_is_sound_and_its_places_are_known(program: str) -> None:
    done = after(tiny(), program, PIPELINES[program][-1].name)
    verify(done)
    assert not list(spans_missing(done))


@pytest.mark.parametrize("program", ["forward", "prefill", "decode"])
def test_embedding_head_gate_norms_attention_and_eh_proj_are_left_alone(program: str) -> None:
    done = placed(program)
    left = {s for g in done.graphs.values() for op in named(g, "linear") for s in op.symbols}
    eh_proj = {"eh_proj.weight"} & {s for g in done.graphs.values() for s in g.weights}
    assert left == {"lm_head.weight", "gate.weight"} | eh_proj
    marked = {s for g in done.graphs.values() for s, w in g.weights.items() if w.fp8}
    cast = {
        s for g in done.graphs.values() for op in named(g, "quantize_weight") for s in op.symbols
    }
    absorbed = {
        s for g in done.graphs.values() for op in named(g, "head_linear") for s in op.symbols
    }
    assert cast == marked - absorbed


def scales(program: Program, graph: str) -> list[tuple[str, object]]:
    found = [
        *named(program.graphs[graph], "quantize"),
        *named(program.graphs[graph], "quantize_weight"),
    ]
    return [(op.results[0].name, op.attrs["scale"]) for op in found]


def test_the_recipe_has_powers_of_two_where_v3_trains_with_them() -> None:
    program = placed()
    assert [name for name, s in scales(program, "MLA") if s == "ue8m0"] == ["o_2_q"]
    assert [name for name, s in scales(program, "DeepSeekMoE") if s == "ue8m0"] == ["x_q"]
    assert all(s == "fp32" for _, s in scales(program, "SwiGLU_192"))


@pytest.mark.parametrize("form", ["fp32", "ue8m0"])
def test_one_format_everywhere(form: str) -> None:
    program = placed("forward", f"precision.scale_format={form}")
    found = [s for name in program.graphs for _, s in scales(program, name)]
    assert len(found) > 10 and set(found) == {form}


def test_projections_of_one_input_share_its_cast() -> None:
    mla = placed().graphs["MLA"]
    of_x = [op for op in named(mla, "quantize") if op.operands[0].name == "x"]
    assert len(of_x) == 1
    assert sum(of_x[0].results[0] in op.operands for op in mla.walk()) == 2  # q_a and kv_a


def test_tokens_are_quantized_before_they_are_sorted_by_expert() -> None:
    moe = placed().graphs["DeepSeekMoE"]
    (permute,) = named(moe, "permute_quantized")
    assert not named(moe, "permute") and permute.operands[0].type.dims[0].name == "batch"
    # 7,168 bytes and 56 scales of 4 for each token of V3.
    v3 = after(load(SPECS / "deepseek_v3.yaml"), "forward", "place_fp8").graphs["DeepSeekMoE"]
    (permute,) = named(v3, "permute_quantized")
    sizes = {"batch": 1, "seq": 1}
    assert sum(v.type.bytes(sizes) for v in permute.operands[:2]) == 7392


def test_experts_of_which_only_some_products_are_in_fp8_stay_sorted_as_they_are() -> None:
    moe = placed("forward", "precision.overrides={experts.*.up_proj: bf16}").graphs["DeepSeekMoE"]
    assert named(moe, "permute") and not named(moe, "permute_quantized")
    kinds = {op.symbols[0]: op.kind for op in moe.walk() if op.kind == "grouped_linear"}
    assert kinds == {"experts.*.up_proj.weight": "grouped_linear"}


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("o_proj: bf16", {"o_proj.weight"}),
        ("shared_experts: bf16", {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}),
        (
            "attention_projections: bf16, kv_*: fp8",
            {"q_a_proj.weight", "q_b_proj.weight", "o_proj.weight"},
        ),
        ("lm_head: fp8", {"lm_head.weight"}),
    ],
)
def test_an_override_is_one_line(override: str, left: set[str]) -> None:
    def products(*sets: str) -> set[str]:
        program = placed("forward", *sets)
        return {s for g in program.graphs.values() for op in named(g, "linear") for s in op.symbols}

    assert products(f"precision.overrides={{{override}}}") ^ products() == left


def test_products_in_float32_are_casts_around_them() -> None:
    mla = placed("forward", "precision.overrides.o_proj=fp32").graphs["MLA"]
    (linear,) = named(mla, "linear")
    assert linear.operands[0].type.dtype == linear.result.type.dtype == "f32"
    (bf16,) = [op for op in named(mla, "cast") if op.operands == linear.results]
    assert mla.results == bf16.results and bf16.result.type.dtype == "bf16"


# ---- before and after compute the same -------------------------------------------------------


def product(f: Frame, op: Op, x: Tensor, *ends: Tensor) -> Tensor:
    """What a product shall compute, without a cast in the graph."""
    form = f.graph.weights[op.symbols[0]].fp8
    weight = torch.cat([f.weight(s) for s in op.symbols], int(bool(ends)))
    if not form:
        return F.grouped_linear(x, *ends, weight) if ends else F.linear(x, weight.to(x.dtype))
    apply = fp8.grouped_linear if ends else fp8.linear
    return apply(*fp8.quantize(x, form), *ends, *fp8.quantize_weight(weight, form), dtype=x.dtype)  # type: ignore[operator,no-any-return]


OVERRIDES = ["o_proj", "kv_a_proj_with_mqa", "experts", "experts.*.gate_proj", "down_proj", "head",
             "dense_feed_forward", "eh_proj", "gate_proj"]  # fmt: skip


@settings(max_examples=12)
@given(
    st.sampled_from(["forward", "prefill"]),
    st.sampled_from(["fp32", "ue8m0"]),
    st.dictionaries(st.sampled_from(OVERRIDES), st.sampled_from(["fp8", "bf16"]), max_size=4),
)
def test_casts_change_nothing_but_where_they_are_made(
    name: str, form: str, overrides: dict[str, str]
) -> None:
    """Each product quantizing for itself gives the same bits as shared and moved casts."""
    text = ", ".join(f"{key}: {value}" for key, value in overrides.items())
    spec = tiny(f"precision.scale_format={form}", f"precision.overrides={{{text}}}")
    before, done = after(spec, name, "fuse_experts"), after(spec, name, "place_fp8")
    inputs, weights = random_inputs(before), random_weights(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUN, "linear", product)
        patch.setitem(RUN, "grouped_linear", product)
        expected = run(before, inputs, weights)
    for found, wanted in zip(run(done, inputs, weights), expected, strict=True):
        assert torch.equal(found, wanted)


def test_fp8_is_near_bf16() -> None:
    """Not equal, and not far: E4M3 has 3 bits of mantissa, and errors of single numbers average."""
    before, done = after(tiny(), "forward", "fuse_experts"), placed()
    inputs = random_inputs(before, graph="SwiGLU_192")
    weights = random_weights(before, graph="SwiGLU_192")
    (wide,), (narrow,) = (run(p, inputs, weights, graph="SwiGLU_192") for p in (before, done))
    error = ((narrow - wide).norm() / wide.norm()).item()
    assert 0.01 < error < 0.1
