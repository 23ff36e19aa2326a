"""Which projections become one product, and which stay by themselves."""

from __future__ import annotations

import pytest

from backends.torch.declare import folded, joined_names
from compiler.graph.core import Program
from compiler.graph.parse import parse_program
from compiler.graph.text import print_program
from compiler.graph.verify import verify
from compiler.passes.fuse_projections import FUSE_PROJECTIONS
from compiler.pipeline import after, compile
from dsl.load import Description, load
from dsl.source import Source
from tests.support.places import TINY

GQA = [
    "blocks=[causal_lm, decoder, gqa, swiglu]",
    "params={vocab_size: 32, hidden_size: 8, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 4, intermediate_size: 8}",
    "architecture={layers: [{repeat: 1, attention: GQA, feed_forward: SwiGLU}]}",
    "train={}",
]


def joined(program: Program) -> set[tuple[str, ...]]:
    """Weights that one product uses together."""
    return {
        op.symbols
        for graph in program.graphs.values()
        for op in graph.walk()
        if op.kind in ("linear", "grouped_linear") and len(op.symbols) > 1
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (
            load(TINY),
            {
                ("q_a_proj.weight", "kv_a_proj_with_mqa.weight"),
                ("gate_proj.weight", "up_proj.weight"),
                ("experts.*.gate_proj.weight", "experts.*.up_proj.weight"),
            },
        ),
        (
            load(TINY, sets=["params.q_lora_rank=0", "precision.policy=bf16"]),
            {
                ("q_proj.weight", "kv_a_proj_with_mqa.weight"),
                ("gate_proj.weight", "up_proj.weight"),
                ("experts.*.gate_proj.weight", "experts.*.up_proj.weight"),
            },
        ),
        (
            load(TINY, sets=GQA),
            {
                ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
                ("gate_proj.weight", "up_proj.weight"),
            },
        ),
    ],
)
def test_every_program_joins_the_same(
    description: Description, expected: set[tuple[str, ...]]
) -> None:
    compiled = compile(description)
    for name, program in compiled.programs.items():
        assert joined(program) == expected, name
        alone = {
            symbol
            for graph in program.graphs.values()
            for op in graph.walk()
            if len(op.symbols) == 1
            for symbol in op.symbols
        }
        assert not alone & {symbol for symbols in expected for symbol in symbols}, name


def test_parts_keep_their_types_and_counts() -> None:
    before, then = (after(load(TINY), "forward", step) for step in ("lower", "fuse_projections"))
    for name, graph in before.graphs.items():
        assert then.graphs[name].weights == graph.weights
        assert [v.type for v in then.graphs[name].results] == [v.type for v in graph.results]


BLOCK = """
program @apart root @Root
graph @Root(%x: f32[batch, seq, h=4]) -> (y: f32[batch, seq, h=4], z: f32[batch, seq, h=4]) {
  weight @a.weight : f32[h=4, h=4]
  weight @b.weight : f32[h=4, h=4]
  %a = linear(%x, @a.weight) : f32[batch, seq, h=4]
  %b = linear(%x, @b.weight) : f32[batch, seq, h=4]
  %y = mul(%a, %b) : f32[batch, seq, h=4]
  %z = add(%y, %x) : f32[batch, seq, h=4]
  return(%y, %z)
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "together"),
    [
        ("", "", True),
        # One output would need one of them without the other.
        ("add(%y, %x)", "add(%a, %x)", False),
        # One is used a second time.
        ("add(%y, %x)", "linear(%y, @a.weight)", False),
        # Other inputs, other groups of names, another element type, one that is not trained.
        ("linear(%x, @b.weight)", "linear(%a, @b.weight)", False),
        ("@b.weight", "@inner.b.weight", False),
        ("@b.weight : f32", "@b.weight : bf16", False),
        ("@b.weight : f32[h=4, h=4]", "@b.weight : f32[h=4, h=4] <trainable=false>", False),
        # A checkpoint holds a copy.
        ("root @Root", "root @Root { alias @copy = @b.weight }", False),
    ],
)
def test_weights_that_a_program_may_need_alone_stay_alone(
    old: str, new: str, together: bool
) -> None:
    program = parse_program(Source("apart.graph", BLOCK.replace(old, new) if old else BLOCK))
    verify(program)
    FUSE_PROJECTIONS.run(program, load(TINY))
    verify(program)
    assert joined(program) == ({("a.weight", "b.weight")} if together else set())


def test_what_decoding_takes_apart_stays_alone() -> None:
    """A second projection of the cached latents joins `kv_b_proj` only if decoding leaves it."""
    text = print_program(after(load(TINY), "decode", "lower"))
    o = "f32[batch, seq, num_attention_heads*v_head_dim=64]"
    weight = "f32[num_attention_heads*v_head_dim=64, kv_lora_rank=24]"
    for old, new in (
        ("  weight @o_proj.weight", f"  weight @more.weight : {weight}\n  weight @o_proj.weight"),
        ("  %o_proj =", f"  %more = linear(%c_kv_4, @more.weight) : {o}\n  %o_proj ="),
        ("  %o_proj =", f"  %sum = add(%o_2, %more) : {o}\n  %o_proj ="),
        ("linear(%o_2, @o_proj", "linear(%sum, @o_proj"),
    ):
        assert old in text
        text = text.replace(old, new)
    keys = "concat(%k_nope, %k_rope_4)"
    for other, together in ((keys, False), ("concat(%k_nope, %q_rope_2)", True)):
        program = parse_program(Source("more.graph", text.replace(keys, other)))
        verify(program)
        FUSE_PROJECTIONS.run(program, load(TINY))
        verify(program)
        assert (("kv_b_proj.weight", "more.weight") in joined(program)) == together


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (["gate_proj", "up_proj"], "gate_up_proj"),
        (["q_proj", "k_proj", "v_proj"], "q_k_v_proj"),
        (["q_a_proj", "kv_a_proj_with_mqa"], "q_a_proj_kv_a_proj_with_mqa"),
        (["w1", "w3"], "w1_w3"),
        (["proj_in", "proj_out"], "proj_in_out"),
        (["a_b_a", "a_b"], "a_b_a_b"),
        (["x_x", "x"], "x_x_x"),
    ],
)
def test_names_of_what_is_stored_as_one(parts: list[str], name: str) -> None:
    assert folded(parts) == name


def test_a_name_that_is_taken_gets_a_number() -> None:
    text = BLOCK.replace("@a.", "@state.").replace("@b.", "@dict.")
    program = parse_program(Source("taken.graph", text))
    lowered = parse_program(Source("taken.graph", text)).main
    FUSE_PROJECTIONS.run(program, load(TINY))
    # Every torch module has a `state_dict` of its own.
    expected = {"state.weight": "state_dict_2", "dict.weight": "state_dict_2"}
    assert joined_names(lowered, [program.main]) == expected
