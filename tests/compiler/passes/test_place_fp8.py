"""FP8: which products, with which scales, and that the rewritten graph computes just these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program
from compiler.graph.text import print_graph
from compiler.graph.verify import spans_missing, verify
from compiler.lower import lower
from compiler.ops.comm import Dispatch
from compiler.parallel.mesh import Mesh
from compiler.passes import place_fp8
from compiler.pipeline import PIPELINES, after
from compiler.pipeline import run as run_passes
from compiler.plan.traffic import expert_bytes
from compiler.rewrite import Miss
from dsl.load import Description, load
from runtime import fp8
from tests.interpret import RUN, random_inputs, random_weights, run
from tests.interpret.frame import Frame
from tests.support.golden import Golden
from tests.support.models import results
from tests.support.places import SPECS, TINY
from tests.support.ranks import MESHES, layout, rank_programs, run_ranks
from tests.support.ranks import named as named_results

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


@pytest.mark.slow
@pytest.mark.parametrize("program", ["forward", "train", "prefill", "decode"])
def test_embedding_head_gate_norms_attention_and_eh_proj_are_left_alone(program: str) -> None:
    done = placed(program)
    left = {s for g in done.graphs.values() for op in named(g, "linear") for s in op.symbols}
    eh_proj = {"eh_proj.weight"} & {s for g in done.graphs.values() for s in g.weights}
    head = {"lm_head.weight"} if program != "train" else set()  # it is one with its loss there
    assert left == {"gate.weight"} | head | eh_proj
    marked = {s for g in done.graphs.values() for s, w in g.weights.items() if w.fp8}
    cast = {s for g in done.graphs.values() for op in named(g, "fp8_weight") for s in op.symbols}
    absorbed = {
        s for g in done.graphs.values() for op in named(g, "head_linear") for s in op.symbols
    }
    assert cast == marked - absorbed


def scales(program: Program, graph: str) -> list[tuple[str, object]]:
    found = [
        *named(program.graphs[graph], "quantize"),
        *named(program.graphs[graph], "fp8_weight"),
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
    made = {v: op for op in mla.walk() for v in op.results}
    users = [op for op in mla.walk() if of_x[0].results[0] in op.operands]
    weights = {s for op in users for v in op.operands if v in made for s in made[v].symbols}
    assert weights == {"q_a_proj.weight", "kv_a_proj_with_mqa.weight"}


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


ONE = """
block One(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size, kv_lora_rank
  narrow = linear(x, to = kv_lora_rank, name = down)
  return linear(narrow, from = kv_lora_rank, to = hidden_size, name = up)
"""


@pytest.mark.slow
def test_the_three_products_of_a_linear_layer(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "one.dsl").write_text(ONE, encoding="utf-8")
    library = "causal_lm, decoder, mla, swiglu, deepseek_moe, mtp"
    blocks = f"blocks=[{library}, {tmp_path / 'one.dsl'}]"
    graphs = placed("train", blocks, "architecture.layers.0.feed_forward=One").graphs
    texts = [print_graph(graphs[name]) for name in ("One", "One_backward")]
    golden("passes/place_fp8_products.graph", "\n".join(texts))


def test_experts_in_training(golden: Golden) -> None:
    graphs = placed("train").graphs
    texts = [print_graph(graphs[name]) for name in ("DeepSeekMoE", "DeepSeekMoE_backward")]
    golden("passes/place_fp8_experts.graph", "\n".join(texts))


def test_what_the_backward_pass_only_quantizes_is_saved_in_fp8() -> None:
    graphs = placed("train").graphs
    moe, backward = graphs["DeepSeekMoE"], graphs["DeepSeekMoE_backward"]
    assert {v.name: v.type.dtype for v in moe.saved if v.name.startswith("rows")} == {
        "rows_q": "f8e4m3",
        "rows_s": "f32",
    }
    assert [v.name for v in moe.saved] == [v.name for v in backward.ops[0].results]
    (sorted_by_expert,) = named(moe, "permute_quantized")
    assert set(sorted_by_expert.results[:2]) <= set(moe.saved)


def test_scales_of_gradients() -> None:
    """Powers of two for gradients that travel to the experts, and for what was one forward."""
    graphs = placed("train").graphs
    casts = [op for op in graphs["DeepSeekMoE_backward"].walk() if "scale" in op.attrs]
    powers = {op.results[0].name for op in casts if op.attrs["scale"] == "ue8m0"}
    assert powers == {"d_down_proj_q", "d_down_proj_columns_q", "rows_columns_q"}
    casts = [op for op in graphs["MLA_backward"].walk() if op.attrs.get("scale") == "ue8m0"]
    assert [op.results[0].name for op in casts] == ["o_2_q", "o_2_columns_q"]


# ---- before and after compute the same -------------------------------------------------------


def form_of(f: Frame, symbols: Sequence[str]) -> str:
    return f.graph.weights[symbols[0]].fp8 if symbols else ""


def product(f: Frame, op: Op, x: Tensor, *ends: Tensor) -> Any:
    """What a product shall compute, without a cast in the graph."""
    form, joined = form_of(f, op.symbols), int(bool(ends))
    if not form:
        return PLAIN[op.kind](f, op, x, *ends)
    rows = [f.graph.weights[s].type.dims[0].size or 0 for s in op.symbols]
    parts = rows if len(rows) > 1 else ()  # each of several weights has blocks of its own
    weight = torch.cat([f.weight(s) for s in op.symbols], joined)
    quantized = fp8.quantize_weight(weight, form, parts)
    cut = parts if op.kind.endswith("input_grad") else ()
    apply = getattr(fp8, op.kind)
    return apply(*fp8.quantize(x, form, cut), *ends, *quantized, dtype=x.dtype, parts=parts)


def weight_grad(f: Frame, op: Op, dy: Tensor, x: Tensor, *ends: Tensor) -> Any:
    readers = [o for o in f.graph.walk() if op.result in o.operands]
    form = form_of(f, readers[0].symbols)
    if not form:
        return PLAIN[op.kind](f, op, dy, x, *ends)
    columns = fp8.requantize(*fp8.quantize(x, form), *ends, scale=form)
    (made_of,) = [o for o in f.graph.walk() if op.operands[0] in o.results] or [None]
    if made_of is not None and made_of.kind == "unpermute_grad":
        gradient = fp8.requantize(*fp8.quantize(dy, form), *ends, scale=form)
    else:
        gradient = fp8.quantize_columns(dy, *ends, scale=form)
    return getattr(fp8, op.kind)(*gradient, *columns, *ends, dtype=dy.dtype)


PRODUCTS = {
    "linear": product,
    "grouped_linear": product,
    "linear_input_grad": product,
    "grouped_linear_input_grad": product,
    "linear_weight_grad": weight_grad,
    "grouped_linear_weight_grad": weight_grad,
}
PLAIN = {kind: RUN[kind] for kind in PRODUCTS}


OVERRIDES = ["o_proj", "kv_a_proj_with_mqa", "experts", "experts.*.gate_proj", "down_proj", "head",
             "dense_feed_forward", "eh_proj", "gate_proj"]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=12)
@given(
    st.sampled_from(["forward", "train", "prefill"]),
    st.sampled_from(["fp32", "ue8m0"]),
    st.dictionaries(st.sampled_from(OVERRIDES), st.sampled_from(["fp8", "bf16"]), max_size=4),
)
def test_casts_change_nothing_but_where_they_are_made(
    name: str, form: str, overrides: dict[str, str]
) -> None:
    """Each product quantizing for itself gives the same bits as shared and moved casts."""
    text = ", ".join(f"{key}: {value}" for key, value in overrides.items())
    spec = tiny(f"precision.scale_format={form}", f"precision.overrides={{{text}}}")
    *_, before, done = (s.program for s in run_passes(name, lower(spec), PIPELINES[name], spec))
    with pytest.MonkeyPatch.context() as patch:
        for kind, meaning in PRODUCTS.items():
            patch.setitem(RUN, kind, meaning)
        expected = results(before)
    found = results(done)
    assert len(found) == len(expected) > 0 and (name != "train" or len(found) > 50)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_fp8_is_near_bf16() -> None:
    """Not equal, and not far: E4M3 has 3 bits of mantissa, and errors of single numbers average."""
    before, done = after(tiny(), "forward", "fuse_experts"), placed()
    inputs = random_inputs(before, graph="SwiGLU_192")
    weights = random_weights(before, graph="SwiGLU_192")
    (wide,), (narrow,) = (run(p, inputs, weights, graph="SwiGLU_192") for p in (before, done))
    error = ((narrow - wide).norm() / wide.norm()).item()
    assert 0.01 < error < 0.1


# ---- ranks ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_travel_to_other_ranks_in_fp8() -> None:
    """The same numbers as on one rank, and for each token of V3 7,168 bytes and 56 scales."""
    spec, mesh = tiny(), MESHES["2 nodes x 2 ranks"]
    (ranked,) = rank_programs(spec, layout(mesh, spec), "forward")
    whole = placed()
    inputs = random_inputs(whole, {"batch": 4, "seq": 6}, graph="DeepSeekMoE")
    weights = random_weights(whole, graph="DeepSeekMoE")
    _, found = run_ranks([ranked], mesh, inputs, weights, graph="DeepSeekMoE", dtype=None)
    (expected,) = run(whole, inputs, weights, graph="DeepSeekMoE")
    (name,) = named_results(ranked.graphs["DeepSeekMoE"])
    # Terms of up to four experts are rounded to bfloat16 in another order.
    torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=2**-7)

    v3 = load(SPECS / "deepseek_v3.yaml")
    ranked, *_ = rank_programs(v3, layout(mesh, v3), "forward")
    graph = ranked.graphs["DeepSeekMoE"]
    (dispatch,) = named(graph, "dispatch")
    assert Dispatch.token_bytes(site_of(dispatch, graph, ranked.graphs)) == 7392
    (combine,) = named(graph, "combine")
    assert combine.operands[0].type.dtype == "bf16"


@cache
def on_four_ranks(*sets: str) -> tuple[Graph, Graph]:
    """A layer of experts on 2 nodes of 2 ranks, forward and backward."""
    spec = tiny("architecture.mtp.depth=0", *sets)
    (ranked,) = rank_programs(spec, layout(MESHES["2 nodes x 2 ranks"], spec))
    return ranked.graphs["DeepSeekMoE"], ranked.graphs["DeepSeekMoE_backward"]


def test_gradients_travel_to_other_ranks_in_fp8(golden: Golden) -> None:
    """With powers of two for scales; where they arrive they are cast again for each expert."""
    _, backward = on_four_ranks("precision.overrides={}")
    lines = print_graph(backward).splitlines()
    ways = ("d_deepseekmoe_q", "d_arrived_y", "d_down_proj_q")
    text = "\n".join(line for line in lines if any(way in line for way in ways))
    golden("passes/place_fp8_dispatch.graph", f"{text}\n")


@pytest.mark.parametrize(
    ("overrides", "there", "again"),
    [("{}", 64 + 4, 64 + 4), ("{experts.*.down_proj: bf16}", 64 + 4, 2 * 64)],
)
def test_rows_travel_in_fp8_where_nothing_else_is_made_of_them(
    overrides: str, there: int, again: int
) -> None:
    """And are as many bytes as plans count."""
    sets = f"precision.overrides={overrides}"
    forward, backward = on_four_ranks(sets)
    sent = [named(forward, "dispatch")[0].operands[:-2], *(
        op.operands[:-1] for op in named(backward, "dispatch_again"))]  # fmt: skip
    one = {"batch": 1, "seq": 1}
    assert [sum(row.type.bytes(one) for row in rows) for rows in sent] == [there, again]
    moe = lower(tiny(sets)).graphs["DeepSeekMoE"]
    (experts,) = named(moe, "experts")
    assert expert_bytes(moe, experts) == (there, 2 * 64, again)


def test_gradients_that_travel_in_fp8_are_those_of_gradients_cast_and_multiplied_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, and not those of gradients that were never cast."""
    spec = tiny("architecture.mtp.depth=0", "architecture.layers.1.repeat=1")
    mesh = Mesh(1, 1, 2, 1)

    def found() -> dict[str, Tensor]:
        (program,) = rank_programs(spec, layout(mesh, spec))
        whole = after(spec, "train", "simplify")
        inputs = random_inputs(whole, {"batch": 2, "seq": 4}, dtype=torch.float64)
        weights = random_weights(whole, dtype=torch.float64)
        return run_ranks([program], mesh, inputs, weights)[1]

    done = found()
    monkeypatch.setattr(place_fp8, "_dispatch_gradients_quantized", lambda at: Miss("", at.op))
    before = found()
    plain = RUN["dispatch_again"]

    def cast(f: Frame, op: Op, d_y: Tensor, handle: Tensor) -> Any:
        there = fp8.dequantize(*fp8.quantize(d_y, "ue8m0"), dtype=d_y.dtype)
        return plain(f, op, there, handle)

    monkeypatch.setitem(RUN, "dispatch_again", cast)
    expected = found()
    assert done.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(done[name], tensor), name
    assert any(not torch.equal(done[name], before[name]) for name in done)
