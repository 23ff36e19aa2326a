"""Each pass: the graph before and after it in text, and proof that both compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiler.graph.core import Graph, Op, Program, copy_program
from compiler.graph.parse import parse_program
from compiler.graph.text import print_graph, print_program
from compiler.graph.verify import spans_missing, verify
from compiler.lower import lower
from compiler.passes.absorb import _absorb
from compiler.passes.fuse_experts import FUSE_EXPERTS, _fuse
from compiler.passes.fuse_gate import FUSE_GATE
from compiler.passes.simplify import SIMPLIFY
from compiler.pipeline import PIPELINES, after
from compiler.rewrite import rewrite
from dsl.source import Source
from tests.support.differences import first_difference
from tests.support.golden import Golden
from tests.support.models import GQA, VARIANTS, description, model, published

# Where a pass shows best: program, the pass before it, the block.
SHOWN = {
    "select_outputs": ("decode", "lower", "CausalLM"),
    "drop_cache": ("forward", "select_outputs", "MLA"),
    "simplify": ("decode", "select_outputs", "CausalLM"),
    "insert_cache": ("decode", "lower", "MLA"),
    "absorb": ("decode", "insert_cache", "MLA"),
    "fuse_projections": ("forward", "lower", "MLA"),
    "hoist": ("prefill", "insert_cache", "CausalLM"),
    "fuse_experts": ("forward", "drop_cache", "DeepSeekMoE"),
    "fuse_gate": ("train", "fuse_experts", "DeepSeekMoE"),
    "fuse_pointwise": ("train", "fuse_gate", "DecoderLayer_DeepSeekMoE"),
    "fuse_loss": ("train", "fuse_pointwise", "CausalLM"),
    "outline": ("train", "fuse_loss", "CausalLM"),
    "differentiate": ("train", "outline", "SwiGLU_32"),
    "recompute": ("train", "differentiate", "MLA_backward"),
    "place_fp8": ("forward", "simplify", "DeepSeekMoE"),
    "fuse_layout": ("train", "place_fp8", "MLA_backward"),
    "fuse_casts": ("train", "fuse_layout", "SwiGLU_128_backward"),
    "encode_saved": ("train", "fuse_casts", "MLA_backward"),
}
# What a pass needs of the spec to do anything.
FP8 = ["precision.policy=fp8_blockwise"]
NEEDS = {
    "place_fp8": FP8,
    "fuse_casts": [*FP8, "params.moe_intermediate_size=128"],
    "encode_saved": ["train.saved_formats.attention=e5m6"],
}


def test_every_pass_is_shown() -> None:
    assert set(SHOWN) == {one.name for passes in PIPELINES.values() for one in passes}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_before_and_after(name: str, golden: Golden) -> None:
    program, before, block = SHOWN[name]
    one_layer = description("architecture.mtp.depth=1", *NEEDS.get(name, []))
    first, then = (after(one_layer, program, step).graphs for step in (before, name))
    texts = {"before": print_graph(first[block]), "after": print_graph(then[block])}
    assert texts["before"] != texts["after"]
    # What the pass made of the block besides: its parts, its gradients.
    new = [n for n in then if n not in first and n.startswith(f"{block}_")]
    texts["after"] += "".join(f"\n{print_graph(then[n])}" for n in new)
    golden(f"passes/{name}.graph", "\n".join(f"// {when} {name}\n{t}" for when, t in texts.items()))


@pytest.mark.slow
@pytest.mark.parametrize("program", PIPELINES)
def test_after_every_pass_the_graph_is_sound_and_knows_its_places(program: str) -> None:
    spec = description()
    current = lower(spec)
    for one in PIPELINES[program]:
        current = copy_program(current)
        one.run(current, spec)
        verify(current)
        assert not list(spans_missing(current)), one.name
        text = print_program(current)
        assert first_difference(current, parse_program(Source("pass.graph", text))) is None


@pytest.mark.slow
@pytest.mark.parametrize("program", PIPELINES)
def test_running_the_passes_again_changes_nothing(program: str) -> None:
    spec = description()
    done = after(spec, program, PIPELINES[program][-1].name)
    again = copy_program(done)
    for one in PIPELINES[program]:
        if one.name != "insert_cache":  # it makes a decoder of what scores whole sequences
            one.run(again, spec)
    assert texts_of(again) == texts_of(done)


def texts_of(program: Program) -> list[str]:
    return [print_graph(graph) for graph in program.graphs.values()]


@pytest.mark.slow
@pytest.mark.parametrize("sets", VARIANTS)
@pytest.mark.parametrize(
    "skip",
    [
        "fuse_projections",
        "hoist",
        "fuse_experts",
        "fuse_gate",
        "fuse_pointwise",
        "absorb",
        "fuse_layout",
    ],
)
def test_with_and_without_a_pass_the_model_computes_the_same(
    skip: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    full, without = model(tmp_path, *sets), model(tmp_path, *sets, skip=(skip,))
    tokens = torch.randint(512, (2, 19), generator=torch.manual_seed(0))
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.mul_(5)  # away from the start, where all experts are nearly alike
    without.load_state_dict(full.state_dict())
    assert torch.allclose(full(tokens).logits, without(tokens).logits, rtol=1e-11, atol=1e-13)
    grads = []
    for one in (full, without):
        loss = one.loss(tokens[:, :-1], tokens[:, 1:]).total
        loss.backward()
        grads.append({part.name: part.grad for part in published(one) if part.declaration.std})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-9, atol=1e-12), name
    kept = {one: one.generate(tokens[:, :5], 12, eos_token_id=None) for one in (full, without)}
    assert torch.equal(kept[full], kept[without])


def test_a_rule_says_why_it_leaves_an_operator() -> None:
    gqa = after(description(*GQA), "decode", "insert_cache")
    (miss,) = rewrite(gqa, "attention", _absorb)
    assert (miss.block, miss.op.kind) == ("GQA", "attention")
    assert miss.reason == "queries and keys are not joined from two parts"


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.walk()]


def test_experts_that_cannot_be_grouped_stay_a_loop() -> None:
    program = after(description(), "forward", "drop_cache")
    moe = program.graphs["DeepSeekMoE"]
    (experts,) = [op for op in moe.walk() if op.kind == "experts"]
    region = experts.regions[0]
    norm = Op("sum", [region.ops[0].results[0]], results=[])
    region.ops.insert(1, norm)
    (miss,) = rewrite(program, "experts", _fuse)
    assert miss.reason == "sum inside an expert has no grouped form"
    region.ops.remove(norm)
    FUSE_EXPERTS.run(program, description())
    assert "experts" not in kinds(moe) and kinds(moe).count("grouped_linear") == 2


@pytest.mark.parametrize("program", PIPELINES)
def test_a_table_of_positions_is_made_once_for_all_layers(program: str) -> None:
    done = after(description(), program, PIPELINES[program][-1].name)
    made = {graph.name: kinds(graph).count("rope_table") for graph in done.graphs.values()}
    # The outermost block, or a part of it; once more for the later positions of each MTP module.
    depths = [op.attrs.get("callee") for op in done.main.walk()].count("MTP")
    assert sum(n for name, n in made.items() if name.startswith(done.root)) == 1 + depths
    assert sum(made.values()) == 1 + depths
    blocks = [graph for graph in done.graphs.values() if not graph.name.startswith(done.root)]
    assert all("position" not in {v.name for v in graph.args} for graph in blocks)


TWICE = """
program @twice root @Root
graph @Root(%x: f32[batch, h=4]) -> (y: f32[batch, h=4], z: f32[layer=2, batch, h=4]) {
  %a = silu(%x) : f32[batch, h=4]
  %b = scale(%a) <by=2.0> : f32[batch, h=4]
  %c = silu(%x) : f32[batch, h=4]
  %d = scale(%c) <by=2.0> : f32[batch, h=4]
  %e = scale(%c) <by=3.0> : f32[batch, h=4]
  %f = add(%b, %d) : f32[batch, h=4]
  %g, %h = repeat(%f) <start=0, count=2> { |%i: f32[batch, h=4]|
    %j = silu(%x) : f32[batch, h=4]
    %k = silu(%i) : f32[batch, h=4]
    %l = add(%j, %k) : f32[batch, h=4]
    yield(%l, %e)
  } : f32[batch, h=4], f32[layer=2, batch, h=4]
  %m = silu(%f) : f32[batch, h=4]
  %n = add(%g, %m) : f32[batch, h=4]
  return(%n, %h)
}
"""


def test_what_was_computed_before_is_not_computed_again() -> None:
    """In the same list and in regions below, but never out of a region."""
    program = parse_program(Source("twice.graph", TWICE))
    verify(program)
    SIMPLIFY.run(program, description())
    verify(program)
    assert kinds(program.main) == [
        "silu", "scale", "scale", "add", "repeat", "silu", "add", "yield", "silu", "add", "return",
    ]  # fmt: skip
    assert [str(v) for op in program.main.walk() for v in op.operands if op.kind == "add"] == [
        "%b", "%b", "%a", "%k", "%g", "%m",
    ]  # fmt: skip


GATE = """
program @gates root @Root
graph @Root(%x: f32[batch, e=4]) -> (r: i64[batch, k=1], w: f32[batch, k=1], t: f32[]) {{
  %s = {made}(%x) : f32[batch, e=4]
  {before}
  %r, %w = topk_groups(%s) <k=(k=1), n_group=1, topk_group=1, group_score=max, normalize=true, scale=1.0> : i64[batch, k=1], f32[batch, k=1]
  {after}
  return(%r, %w, %t)
}}
"""  # noqa: E501
SUM = "%t = sum({}) : f32[]"


@pytest.mark.parametrize(
    ("made", "before", "after", "kinds_then", "reason"),
    [
        ("softmax", "", SUM.format("%x"), ["gate", "sum", "return"], ""),
        ("sigmoid", "", SUM.format("%s"), ["gate_saving", "sum", "return"], ""),
        (
            "sigmoid", SUM.format("%s"), "", ["sigmoid", "sum", "topk_groups", "return"],
            "the scores are read before experts are chosen by them",
        ),
        (
            "silu", "", SUM.format("%x"), ["silu", "topk_groups", "sum", "return"],
            "the scores are made by no sigmoid or softmax",
        ),
    ],
)  # fmt: skip
def test_a_gate_is_one_unless_its_scores_are_read_before(
    made: str, before: str, after: str, kinds_then: list[str], reason: str
) -> None:
    text = GATE.format(made=made, before=before, after=after)
    program = parse_program(Source("gate.graph", text))
    misses = FUSE_GATE.run(program, description())
    SIMPLIFY.run(program, description())
    verify(program)
    assert kinds(program.main) == kinds_then
    assert [miss.reason for miss in misses] == [reason] * bool(reason)
