"""The first difference of two programs, in a line that a person understands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from compiler.graph.core import Boundary, CacheType, Derivative, Op, Program, Step, copy_program
from compiler.graph.equal import changed_graphs, equal_graphs
from compiler.graph.types import Dim, Type
from compiler.lower import lower
from dsl.load import load
from dsl.source import Source
from specs import SPECS
from tests.support.differences import equal, first_difference


@pytest.fixture(scope="module")
def tiny() -> Program:
    return lower(load(SPECS / "deepseek_v3_tiny.yaml"))


def program_name(p: Program) -> None:
    p.name = "other"


def root(p: Program) -> None:
    p.root = "MLA"


def alias(p: Program) -> None:
    p.aliases.popitem()


def order_of_graphs(p: Program) -> None:
    p.graphs["MLA"] = p.graphs.pop("MLA")


def graph_name(p: Program) -> None:
    p.main.name = "Other"


def about(p: Program) -> None:
    p.main.about += "!"


def argument_type(p: Program) -> None:
    p.main.args[0].type = Type("i32", p.main.args[0].type.dims)


def result_names(p: Program) -> None:
    p.main.result_names = (*p.main.result_names[:-1], "other")


def weight(p: Program) -> None:
    p.main.weights["model.norm.weight"] = replace(p.main.weights["model.norm.weight"], std=0.5)


def order_of_weights(p: Program) -> None:
    p.main.weights["model.norm.weight"] = p.main.weights.pop("model.norm.weight")


def derivative(p: Program) -> None:
    p.derivatives["MLA"] = Derivative("MLA_backward", results=(0,), arguments=(0,))


def boundary(p: Program) -> None:
    p.boundary = Boundary(sent=("h",))


def count(p: Program) -> None:
    p.counts["valid"] = "labels"


def step(p: Program) -> None:
    p.steps["MLA"] = Step("MLA_reduce", "MLA_update")


def new_cache(p: Program) -> None:
    p.main.caches["h"] = CacheType(Type("bf16", (Dim("batch"),)))


def operator(p: Program) -> None:
    p.graphs["SwiGLU_32"].ops[1].kind = "sigmoid"


def operator_less(p: Program) -> None:
    del p.graphs["SwiGLU_32"].ops[-1]


def operand_type(p: Program) -> None:
    # The name is the same; only the recorded type tells the two values apart.
    op = p.graphs["SwiGLU_32"].ops[1]
    op.operands = [replace(op.operands[0], type=Type("bf16"))]


def result_type(p: Program) -> None:
    p.graphs["SwiGLU_32"].ops[-2].result.type = Type("bf16")


def attribute(p: Program) -> None:
    p.graphs["DeepSeekMoE"].ops[2].attrs["scale"] = 3


def type_of_attribute(p: Program) -> None:
    p.graphs["DeepSeekMoE"].ops[2].attrs["normalize"] = 1


def region_argument(p: Program) -> None:
    p.graphs["DeepSeekMoE"].ops[3].regions[0].args[0].name = "other"


def region_operator(p: Program) -> None:
    p.graphs["DeepSeekMoE"].ops[3].regions[0].ops.insert(1, Op("constant"))


def region_less(p: Program) -> None:
    p.graphs["DeepSeekMoE"].ops[3].regions.clear()


CHANGES: dict[Callable[[Program], None], str] = {
    program_name: "program: name is deepseek_v3_tiny in the first, other in the second",
    root: "program: root is CausalLM in the first, MLA in the second",
    alias: "program: line 4 is alias @model.layers.4.shared_head.head.weight = @lm_head.weight in "
    "the first, missing in the second",
    derivative: "program: line 5 is missing in the first, derivative @MLA = @MLA_backward "
    "<results=(0), arguments=(0)> in the second",
    boundary: "program: line 5 is missing in the first, boundary <sent=(h)> in the second",
    count: "program: line 5 is missing in the first, count @valid = @labels in the second",
    step: "program: line 5 is missing in the first, step @MLA = @MLA_reduce, "
    "@MLA_update in the second",
    order_of_graphs: "program: graph 1 is @MLA in the first, @SwiGLU_192 in the second",
    graph_name: "graph @CausalLM: name is CausalLM in the first, Other in the second",
    argument_type: "graph @CausalLM: argument 1 is %tokens: i64[batch, seq] in the first, %tokens: "
    "i32[batch, seq] in the second",
    result_names: "graph @CausalLM: result 11 is load in the first, other in the second",
    weight: "graph @CausalLM: weight 2 is @model.norm.weight : f32[hidden_size=64] <init=ones> in "
    "the first, @model.norm.weight : f32[hidden_size=64] <init=ones, std=0.5> in the second",
    order_of_weights: "graph @CausalLM: weight 2 is @model.norm.weight : f32[hidden_size=64] "
    "<init=ones> in the first, @lm_head.weight : f32[vocab_size=512, hidden_size=64] <std=0.02> in "
    "the second",
    new_cache: "graph @CausalLM: cache 1 is missing in the first, @h : bf16[batch] in the second",
    operator: "graph @SwiGLU_32: operator 2 is %gate = silu(%gate_proj) in the first, %gate = "
    "sigmoid(%gate_proj) in the second",
    operator_less: "graph @SwiGLU_32: operator 6 is return(%down_proj) in the first, missing in "
    "the second",
    operand_type: "graph @SwiGLU_32, %gate = silu(%gate_proj): operand 1 is %gate_proj: "
    "f32[batch, seq, intermediate_size=32] in the first, %gate_proj: bf16[] in the second",
    result_type: "graph @SwiGLU_32, %down_proj = linear(%mul, @down_proj.weight): result 1 is "
    "%down_proj: f32[batch, seq, hidden_size=64] in the first, %down_proj: bf16[] in the second",
    attribute: "scale = 2.5 in the first, scale = 3 in the second",
    type_of_attribute: "normalize = True in the first, normalize = 1 in the second",
    region_argument: "region 1: argument 1 is %z: f32[token, hidden_size=64] in the first, "
    "%other: f32[token, hidden_size=64] in the second",
    region_operator: "region 1: operator 2 is %gate_2 = silu(%gate_proj) in the first, constant() "
    "in the second",
    region_less: "number of regions is 1 in the first, 0 in the second",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_named(change: Callable[[Program], None], tiny: Program) -> None:
    changed = copy_program(tiny)
    change(changed)
    difference = first_difference(tiny, changed)
    assert difference is not None
    assert difference.endswith(CHANGES[change])
    assert "\n" not in difference
    assert not equal(changed, tiny)
    named = re.match(r"graph @(\w+)", difference)
    assert changed_graphs(tiny, changed) == ({named[1]} if named else set())


def test_added_and_removed_graphs_are_changed(tiny: Program) -> None:
    less = copy_program(tiny)
    del less.graphs["MLA"]
    assert changed_graphs(tiny, less) == changed_graphs(less, tiny) == {"MLA"}


def test_a_value_of_another_graph_is_a_difference_that_no_text_shows(tiny: Program) -> None:
    broken = copy_program(tiny)
    op = broken.graphs["SwiGLU_32"].ops[1]
    op.operands = [replace(op.operands[0])]
    assert first_difference(tiny, broken) is None
    assert changed_graphs(tiny, broken) == {"SwiGLU_32"}


def test_spans_and_identity_do_not_count(tiny: Program) -> None:
    moved = copy_program(tiny)
    for graph in moved.graphs.values():
        graph.span = None
        for op in graph.walk():
            op.spans = (Source("elsewhere", "").span(0, 0),)
    assert first_difference(tiny, moved) is None
    assert equal(tiny, moved)


def test_graphs_compare_by_themselves(tiny: Program) -> None:
    again = copy_program(tiny)
    assert equal_graphs(tiny.main, again.main)
    again.main.ops.pop()
    assert not equal_graphs(tiny.main, again.main)
    assert not equal_graphs(tiny.main, tiny.graphs["MLA"])
