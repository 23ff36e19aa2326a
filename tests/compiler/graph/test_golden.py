"""The text of every block that comes with dslc, and of two whole models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest

from compiler.graph.core import Attr, Program
from compiler.graph.parse import parse_program
from compiler.graph.text import print_graph, print_program
from compiler.graph.types import Dim
from compiler.graph.verify import spans_missing, verify
from compiler.lower import lower
from dsl.load import load
from dsl.source import Source
from specs import SPECS
from tests.support.differences import first_difference
from tests.support.golden import Golden
from tests.support.places import GOLDEN, TINY

MODELS = ["deepseek_v2_236b", "deepseek_v2_lite", "deepseek_v3", "deepseek_v3_tiny"]


@dataclass(frozen=True)
class Case:
    """A graph of a small model: of the spec beside the golden file, or of the tiny one."""

    graph: str
    sets: tuple[str, ...] = ()
    own_spec: bool = False


CASES = {
    "mla": Case("MLA"),
    "mla_without_q_compression": Case("MLA", ("params.q_lora_rank=0",)),
    "mha": Case("MHA", own_spec=True),
    "gqa": Case("GQA", own_spec=True),
    "swiglu": Case("SwiGLU_192"),
    "deepseek_moe": Case("DeepSeekMoE"),
    "softmax_moe": Case("SoftmaxMoE", own_spec=True),
    "decoder_layer": Case("DecoderLayer_DeepSeekMoE"),
    "mtp": Case("MTP"),
    "mtp_hidden_first": Case("MTP", ('params.mtp_concat="hidden_first"',)),
    "mtp_before_norm": Case("MTP", ('params.mtp_hidden_state="before_norm"',)),
    "causal_lm": Case("CausalLM"),
    "causal_lm_tied": Case("CausalLM", ("params.tie_word_embeddings=true",)),
}


@cache
def lowered(name: str) -> Program:
    case = CASES[name]
    spec = GOLDEN / "graph" / f"{name}.yaml" if case.own_spec else TINY
    return lower(load(spec, sets=case.sets))


def text_of(name: str) -> str:
    return print_graph(lowered(name).graphs[CASES[name].graph])


@pytest.mark.parametrize("name", CASES)
def test_lowering_of_a_block(name: str, golden: Golden) -> None:
    golden(f"graph/{name}.txt", text_of(name))


@pytest.mark.parametrize("model", ["deepseek_v3", "deepseek_v3_tiny"])
def test_lowering_of_a_model(model: str, golden: Golden) -> None:
    golden(f"graph/{model}.txt", print_program(lower(load(SPECS / f"{model}.yaml"))))


@pytest.mark.slow
@pytest.mark.parametrize("locs", [False, True], ids=["without places", "with places"])
@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_programs_read_back_equal(name: str, locs: bool) -> None:
    program = lowered(name) if name in CASES else lower(load(SPECS / f"{name}.yaml"))
    text = print_program(program, locs)
    again = parse_program(Source(f"{name}.graph", text))
    assert first_difference(program, again) is None
    assert print_program(again, locs) == text
    verify(again)


@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_lowered_programs_are_sound_and_know_their_source(name: str) -> None:
    program = lowered(name) if name in CASES else lower(load(SPECS / f"{name}.yaml"))
    verify(program)
    assert spans_missing(program) == []


def test_an_operator_without_source_is_named() -> None:
    program = lower(load(TINY))
    program.graphs["SwiGLU_32"].ops[1].spans = ()
    assert spans_missing(program) == ["@SwiGLU_32: %gate = silu(%gate_proj)"]


@pytest.mark.parametrize("name", CASES)
def test_every_change_shows_in_the_golden_text(name: str) -> None:
    """Each attribute, weight, type and name counts: a golden file cannot hold by accident."""
    expected = (GOLDEN / "graph" / f"{name}.txt").read_text(encoding="utf-8")
    assert text_of(name) == expected
    for change in changes(lowered(name), CASES[name].graph):
        assert text_of(name) != expected, change
    assert text_of(name) == expected


def changes(program: Program, name: str) -> Iterator[str]:
    """Makes one change after the other, and takes each back when the caller has seen it."""
    graph = program.graphs[name]
    for op in graph.walk():
        for key, value in op.attrs.items():
            op.attrs[key] = other(value)
            yield f"{op.kind} <{key}>"
            op.attrs[key] = value
        for result in op.results:
            old = result.type
            result.type = old.with_dims(*old.dims, Dim("more", 1))
            yield f"type of {result}"
            result.type = old
            result.name, old_name = f"{result.name}_x", result.name
            yield f"name of {old_name}"
            result.name = old_name
        op.kind, kind = "other", op.kind
        yield f"kind of {kind}"
        op.kind = kind
    for key, weight in graph.weights.items():
        for field in ("init", "std", "trainable", "stack"):
            graph.weights[key] = replace(weight, **{field: other(getattr(weight, field))})
            yield f"{field} of @{key}"
        graph.weights[key] = weight


def other(value: Attr) -> Attr:
    match value:
        case bool():
            return not value
        case tuple():
            return (*value[:-1], other(value[-1]))
        case str():
            return f"{value}_x"
        case _:
            return value + 1
