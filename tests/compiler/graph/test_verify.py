"""Every kind of broken graph is refused, with a message that says what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from compiler.graph.core import CacheType, Op, Program, Value, Weight
from compiler.graph.parse import parse_program
from compiler.graph.types import Dim, Type
from compiler.graph.verify import verify
from compiler.lower import lower
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError, render
from dsl.load import load
from dsl.source import Source
from specs import SPECS

GOOD = """\
program @small root @Model {
  alias @head.weight = @embed.weight
}

graph @Block(%x: bf16[batch, seq, hidden=8]) -> (y: bf16[batch, seq, hidden=8]) {
  weight @norm.weight : bf16[hidden=8] <init=ones>
  weight @gate.weight : bf16[expert=4, hidden=8]
  weight @experts.*.up.weight : bf16[hidden=8, hidden=8] <stack=4>
  %n = rms_norm(%x, @norm.weight) <eps=1e-06> : bf16[batch, seq, hidden=8]
  %score = linear(%n, @gate.weight) : bf16[batch, seq, expert=4]
  %route, %w = topk_groups(%score) <k=(k=2), n_group=1, topk_group=1, group_score=max, normalize=true, scale=1.0> : i64[batch, seq, k=2], bf16[batch, seq, k=2]
  %y = experts(%x, %route, %w) <count=4> { |%z: bf16[token, hidden=8]|
    %up = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]
    yield(%up)
  } : bf16[batch, seq, hidden=8]
  return(%y)
}

graph @Model(%tokens: i64[batch, seq]) -> (h: bf16[batch, seq, hidden=8]) {
  weight @embed.weight : bf16[vocab=32, hidden=8]
  %h = embedding(%tokens, @embed.weight) : bf16[batch, seq, hidden=8]
  %h_3 = repeat(%h) <start=0, count=2> { |%h_1: bf16[batch, seq, hidden=8]|
    %h_2 = call(%h_1) <callee=Block, scope=layers.*> : bf16[batch, seq, hidden=8]
    yield(%h_2)
  } : bf16[batch, seq, hidden=8]
  %kept = cache_entry(%h_3) <entries=(h)> : bf16[batch, seq, hidden=8]
  %last = call(%kept) <callee=Block, scope=layers.2> : bf16[batch, seq, hidden=8]
  return(%last)
}
"""  # noqa: E501

# What is replaced in the good text, and what the verifier says of it. Each key is one invariant.
REPLACED = {
    "root": (
        "root @Model", "root @Other",
        "E510: program @small has no graph @Other to begin with",
    ),
    "names of results": (
        "-> (y: bf16[batch, seq, hidden=8])", "-> (y.z: bf16[batch, seq, hidden=8])",
        "E510: graph @Block: the name of a result is no identifier: 'y.z'",
    ),
    "name of a value taken": (
        "%up = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]\n    yield(%up)",
        "%n = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]\n    yield(%n)",
        "E511: graph @Block, %n = linear(%z, @experts.*.up.weight): the name %n is taken by "
        "another value",
    ),
    "name of an argument taken": (
        "|%z: bf16[token, hidden=8]|\n    %up = linear(%z,",
        "|%n: bf16[token, hidden=8]|\n    %up = linear(%n,",
        "E511: graph @Block, %y = experts(%x, %route, %w): the name %n is taken by another value",
    ),
    "kind": (
        "rms_norm(", "no_norm(",
        "E512: graph @Block, %n = no_norm(%x, @norm.weight): there is no operator no_norm",
    ),
    "number of operands": (
        "rms_norm(%x,", "rms_norm(%x, %x,",
        "E512: graph @Block, %n = rms_norm(%x, %x, @norm.weight): takes 1 operands (x), got 2",
    ),
    "number of weights": (
        "linear(%n, @gate.weight)", "linear(%n)",
        "E512: graph @Block, %score = linear(%n): takes the weights (weight*), got 0",
    ),
    "a weight twice": (
        "linear(%n, @gate.weight)", "linear(%n, @gate.weight, @gate.weight)",
        "E512: graph @Block, %score = linear(%n, @gate.weight, @gate.weight): takes a weight twice",
    ),
    "number of regions": (
        "<eps=1e-06>", "<eps=1e-06> { yield() }",
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): takes 0 regions, got 1",
    ),
    "unknown attribute": (
        "<eps=1e-06>", "<eps=1e-06, bias=true>",
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): knows no attribute bias",
    ),
    "missing attribute": (
        "<eps=1e-06>", "",
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): attribute eps is missing",
    ),
    "type of an attribute": (
        "<eps=1e-06>", "<eps=1>",
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): eps is 1, and not float",
    ),
    "true is no whole number": (
        "n_group=1,", "n_group=true,",
        "E512: graph @Block, %route, %w = topk_groups(%score): n_group is True, and not int",
    ),
    "attribute that is not finite": (
        "<eps=1e-06>", "<eps=nan>",
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): eps is nan, which a graph cannot "
        "hold",
    ),
    "count of a repeat": (
        "<start=0, count=2>", "<start=0, count=0>",
        "E512: graph @Model, %h_3 = repeat(%h): counts at least 1, from a layer of at least 0",
    ),
    "start of a repeat": (
        "<start=0, count=2>", "<start=-1, count=2>",
        "E512: graph @Model, %h_3 = repeat(%h): counts at least 1, from a layer of at least 0",
    ),
    "recorded type": (
        "<eps=1e-06> : bf16[batch, seq, hidden=8]", "<eps=1e-06> : f32[batch, seq, hidden=8]",
        "E513: graph @Block, %n = rms_norm(%x, @norm.weight): makes bf16[batch, seq, hidden=8], "
        "and is recorded as f32[batch, seq, hidden=8]",
        "E513: graph @Block, %score = linear(%n, @gate.weight): makes f32[batch, seq, expert=4], "
        "and is recorded as bf16[batch, seq, expert=4]",
    ),
    "dimensions that do not meet": (
        "@norm.weight : bf16[hidden=8]", "@norm.weight : bf16[hidden=9]",
        "E513: graph @Block, %n = rms_norm(%x, @norm.weight): rms_norm expects [hidden (9)], got "
        "hidden (8)",
    ),
    "what a region takes": (
        "%z: bf16[token, hidden=8]|\n    %up = linear(%z, @experts.*.up.weight) : bf16[token,",
        "%z: bf16[batch, hidden=8]|\n    %up = linear(%z, @experts.*.up.weight) : bf16[batch,",
        "E513: graph @Block, %y = experts(%x, %route, %w): an expert takes bf16[token, hidden=8], "
        "this one bf16[batch, hidden=8]",
    ),
    "what a repeat carries": (
        "yield(%h_2)",
        "%f = cast(%h_2) <dtype=f32> : f32[batch, seq, hidden=8]\n    yield(%f)",
        "E513: graph @Model, %h_3 = repeat(%h): repeat carries bf16[batch, seq, hidden=8], but its "
        "region makes f32[batch, seq, hidden=8] of it",
    ),
    "attributes that make no sense together": (
        "<k=(k=2),", "<k=(k=2, l=2),",
        "E513: graph @Block, %route, %w = topk_groups(%score): its operands and attributes make "
        "no sense together",
    ),
    "dimension without a size": (
        "%tokens: i64[batch, seq]", "%tokens: i64[batch, length]",
        "E513: graph @Model: dimension length has no size",
        "E513: graph @Model, %h = embedding(%tokens, @embed.weight): makes "
        "bf16[batch, length, hidden=8], and is recorded as bf16[batch, seq, hidden=8]",
    ),
    "dimension of size 0": (
        "@embed.weight : bf16[vocab=32,", "@embed.weight : bf16[vocab=0,",
        "E513: graph @Model: dimension vocab=0 has an impossible size",
    ),
    "axis that no mesh has": (
        "%tokens: i64[batch, seq]", "%tokens: i64[batch@node, seq]",
        "E513: graph @Model: spread over node; a mesh has the axes mirror, replica, expert, in "
        "order",
        "E513: graph @Model, %h = embedding(%tokens, @embed.weight): makes "
        "bf16[batch@node, seq, hidden=8], and is recorded as bf16[batch, seq, hidden=8]",
    ),
    "axis of what is no expert": (
        "@norm.weight : bf16[hidden=8] <init=ones>", "@norm.weight : bf16[hidden=8] <axis=expert>",
        "E515: graph @Block: weight @norm.weight is spread over expert without a *",
    ),
    "no yield": (
        "    yield(%up)\n", "",
        "E514: graph @Block, %up = linear(%z, @experts.*.up.weight): stands last, where `yield` "
        "belongs",
    ),
    "yield of a graph": (
        "return(%y)", "yield(%y)",
        "E514: graph @Block, yield(%y): stands last, where `return` belongs",
    ),
    "return in the middle": (
        "  %n = rms_norm", "  return(%x)\n  %n = rms_norm",
        "E514: graph @Block, return(%x): stands before other operators of its region",
    ),
    "empty region": (
        "{ |%h_1: bf16[batch, seq, hidden=8]|\n"
        "    %h_2 = call(%h_1) <callee=Block, scope=layers.*> : bf16[batch, seq, hidden=8]\n"
        "    yield(%h_2)\n", "{ |%h_1: bf16[batch, seq, hidden=8]|\n",
        "E514: graph @Model, %h_3 = repeat(%h): there is no `yield`",
    ),
    "unknown weight": (
        "%n, @gate.weight)", "%n, @gate.bias)",
        "E515: graph @Block, %score = linear(%n, @gate.bias): there is no weight @gate.bias",
    ),
    "unused weight": (
        "  weight @embed", "  weight @more.weight : f32[vocab=32]\n  weight @embed",
        "E515: graph @Model: weight @more.weight is used by no operator",
    ),
    "expert's weight outside of experts": (
        "linear(%n, @gate.weight) : bf16[batch, seq, expert=4]",
        "linear(%n, @experts.*.up.weight) : bf16[batch, seq, hidden=8]",
        "E515: graph @Block, %score = linear(%n, @experts.*.up.weight): @experts.*.up.weight "
        "belongs to an expert, and this is none",
    ),
    "number of experts": (
        "<stack=4>", "<stack=3>",
        "E515: graph @Block, %up = linear(%z, @experts.*.up.weight): @experts.*.up.weight is there "
        "for 3 experts, of which there are 4",
    ),
    "stack without experts": (
        "@norm.weight : bf16[hidden=8] <init=ones>", "@norm.weight : bf16[hidden=8] <stack=2>",
        "E515: graph @Block: weight @norm.weight is stacked 2 times without a *",
    ),
    "weight of unknown size": (
        "@embed.weight : bf16[vocab=32, hidden=8]", "@embed.weight : bf16[token, hidden=8]",
        "E515: graph @Model: weight @embed.weight has a size that is not known: "
        "bf16[token, hidden=8]",
    ),
    "unknown callee": (
        "callee=Block, scope=layers.2", "callee=Blok, scope=layers.2",
        "E516: graph @Model, %last = call(%kept): there is no graph @Blok",
    ),
    "arguments of a call": (
        "call(%kept)", "call(%kept, %h)",
        "E513: graph @Model, %last = call(%kept, %h): Block takes 1 tensors, got 2",
    ),
    "dimensions of a call": (
        "call(%kept)", "call(%tokens)",
        "E513: graph @Model, %last = call(%tokens): Block expects bf16[batch, seq, hidden=8], got "
        "i64[batch, seq]",
    ),
    "recursion": (
        "%n = rms_norm(%x,",
        "%m = call(%x) <callee=Block, scope=more> : bf16[batch, seq, hidden=8]\n"
        "  %n = rms_norm(%m,",
        "E516: @Block calls @Block: a graph cannot hold itself",
    ),
    "unknown callee in a region": (
        "%up = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]",
        "%more = call(%x) <callee=Other, scope=more> : bf16[batch, seq, hidden=8]\n"
        "    %up = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]",
        "E516: graph @Block, %more = call(%x): there is no graph @Other",
    ),
    "scope of a repeat without a star": (
        "scope=layers.*", "scope=layers.0",
        "E517: graph @Model, %h_2 = call(%h_1): scope layers.0 has 0 `*` for 1 repeats around it",
    ),
    "star outside of a repeat": (
        "scope=layers.2", "scope=layers.*",
        "E517: graph @Model, %last = call(%kept): scope layers.* has 1 `*` for 0 repeats around it",
    ),
    "same scope twice": (
        "scope=layers.2", "scope=layers.1",
        "E517: graph @Model, %last = call(%kept): layers.0..1 and layers.1 name the same module or "
        "weight",
    ),
    "scope inside a scope": (
        "scope=layers.2", "scope=layers.1.more",
        "E517: graph @Model, %last = call(%kept): layers.0..1 and layers.1.more name the same "
        "module or weight",
    ),
    "scope with the name of a weight": (
        "scope=layers.2", "scope=embed",
        "E517: graph @Model, %last = call(%kept): embed and embed.weight name the same module or "
        "weight",
    ),
    "alias of nothing": (
        "= @embed.weight\n", "= @layers.3.norm.weight\n",
        "E517: alias @head.weight = @layers.3.norm.weight: there is no weight "
        "@layers.3.norm.weight",
    ),
    "alias with the name of a weight": (
        "@head.weight =", "@layers.1.experts.3.up.weight =",
        "E517: alias @layers.1.experts.3.up.weight = @embed.weight: "
        "@layers.1.experts.3.up.weight is a weight of its own, or no name",
    ),
    "number of cache entries": (
        "<entries=(h)>", "<entries=(h, k)>",
        "E518: graph @Model, %kept = cache_entry(%h_3): has 2 names for 1 values",
    ),
    "name of a cache entry": (
        "<entries=(h)>", "<entries=(1)>",
        "E518: graph @Model, %kept = cache_entry(%h_3): the cache 1 has this name a second time, "
        "or no name",
    ),
    "cache that nobody declared": (
        "cache_entry(", "cache_append(",
        "E518: graph @Model, %kept = cache_append(%h_3): there is no cache @h of "
        "bf16[batch, seq, hidden=8]",
    ),
    "cache beside marks": (
        "  %h = embedding", "  cache @h : bf16[batch, seq, hidden=8]\n  %h = embedding",
        "E518: graph @Model, %kept = cache_entry(%h_3): marks what its graph keeps in caches "
        "already",
    ),
    "cache in a region": (
        "    yield(%h_2)", "    %c = cache_entry(%h_2) <entries=(c)> : bf16[batch, seq, hidden=8]\n"
        "    yield(%h_2)",
        "E518: graph @Model, %c = cache_entry(%h_2): stands in a region; a cache belongs to a "
        "block",
    ),
}  # fmt: skip


def parsed(text: str) -> Program:
    return parse_program(Source("small.graph", text))


def refused(program: Program) -> list[str]:
    """What is wrong, which is found, too, where only what is not as in GOOD is checked."""
    found = []
    for since in (None, parsed(GOOD)):
        with pytest.raises(DiagnosticError) as caught:
            verify(program, since)
        found.append([f"{d.code}: {d.message}" for d in caught.value.diagnostics])
    assert found[0] == found[1]
    return found[0]


def test_the_good_program_is_accepted() -> None:
    verify(parsed(GOOD))


@pytest.mark.parametrize("case", REPLACED)
def test_broken_text_is_refused(case: str) -> None:
    old, new, *messages = REPLACED[case]
    assert GOOD.count(old) == 1
    assert sorted(refused(parsed(GOOD.replace(old, new)))) == sorted(messages)


# ---- what no text can say: operators and values put together wrongly ----------------------------


def use_before_definition(program: Program) -> None:
    ops = program.graphs["Block"].ops
    ops[0], ops[1] = ops[1], ops[0]


def use_outside_of_region(program: Program) -> None:
    block = program.graphs["Block"]
    block.ops[0].operands = [block.ops[3].regions[0].ops[0].result]


def use_after_region(program: Program) -> None:
    block = program.graphs["Block"]
    block.ops[-1].operands = [block.ops[3].regions[0].args[0]]


def use_of_own_result(program: Program) -> None:
    op = program.graphs["Block"].ops[0]
    op.operands = [op.result]


def use_of_a_stranger(program: Program) -> None:
    program.graphs["Block"].ops[0].operands = [program.main.args[0]]


def value_defined_twice(program: Program) -> None:
    block = program.graphs["Block"]
    block.ops.insert(1, block.ops[0])


def value_without_identifier(program: Program) -> None:
    program.graphs["Block"].ops[0].result.name = "a.b"


def results_missing(program: Program) -> None:
    program.graphs["Block"].ops[2].results.pop()
    program.graphs["Block"].ops[3].operands[2] = program.graphs["Block"].ops[2].results[0]


def names_of_results_missing(program: Program) -> None:
    program.main.result_names = ()


def kept_under_another_name(program: Program) -> None:
    program.graphs["Block"].name = "Blok"


def graph_without_operators(program: Program) -> None:
    program.main.ops.clear()


def number_too_large(program: Program) -> None:
    program.main.ops[1].attrs["count"] = 2**63


def attribute_of_no_kind(program: Program) -> None:
    program.graphs["Block"].ops[2].attrs["k"] = ("k", None)  # type: ignore[assignment]


def weight_without_name(program: Program) -> None:
    program.main.weights["a b"] = Weight(Type("f32", (Dim("n", 1),)))


def element_type(program: Program) -> None:
    program.graphs["Block"].args[0].type = Type("f8", (Dim("batch"), Dim("seq"), Dim("hidden", 8)))


def name_of_dimension(program: Program) -> None:
    program.main.args[0].type = Type("i64", (Dim("a b"),))


def missing_tokens(program: Program) -> None:
    program.main.args[0].type = Type("i64", (Dim("batch"), Dim("seq", None, -1)))


def expert_that_calls(program: Program) -> None:
    program.graphs["Leaf"] = parsed(GOOD.replace("@Block", "@Leaf")).graphs["Leaf"]
    region = program.graphs["Block"].ops[3].regions[0]
    attrs = {"callee": "Leaf", "scope": "leaf"}
    made = Value("made", Type("bf16", (Dim("batch"), Dim("seq"), Dim("hidden", 8))))
    region.ops.insert(0, Op("call", [program.graphs["Block"].args[0]], (), dict(attrs), [], [made]))


def circle(program: Program) -> None:
    block = program.graphs["Block"]
    attrs = {"callee": "Model", "scope": "model"}
    tokens = Value("tokens", Type("i64", (Dim("batch"), Dim("seq"))))
    block.args.append(tokens)
    made = Value("made", block.args[0].type)
    block.ops.insert(0, Op("call", [tokens], (), dict(attrs), [], [made]))
    for op in program.main.walk():
        if op.kind == "call":
            op.operands.append(program.main.args[0])


def cache_without_entries(program: Program) -> None:
    program.graphs["Block"].caches["h"] = CacheType(Type("bf16"))


def program_without_identifier(program: Program) -> None:
    program.name = "a-b"


MUTATED: dict[Callable[[Program], None], str] = {
    use_before_definition: "E511: graph @Block, %score = linear(%n, @gate.weight): %n is used "
    "before it is defined",
    use_outside_of_region: "E511: graph @Block, %n = rms_norm(%up, @norm.weight): %up is used "
    "before it is defined",
    use_after_region: "E511: graph @Block, return(%z): %z is a value of a region, and is used "
    "outside of it",
    use_of_own_result: "E511: graph @Block, %n = rms_norm(%n, @norm.weight): %n is used before it "
    "is defined",
    use_of_a_stranger: "E511: graph @Block, %n = rms_norm(%tokens, @norm.weight): %tokens is "
    "defined nowhere",
    value_defined_twice: "E511: graph @Block, %n = rms_norm(%x, @norm.weight): %n is defined twice",
    value_without_identifier: "E511: graph @Block, %a.b = rms_norm(%x, @norm.weight): the name of "
    "a value is no identifier: 'a.b'",
    results_missing: "E513: graph @Block, %route = topk_groups(%score): makes i64[batch, seq, k=2],"
    " bf16[batch, seq, k=2], and is recorded as i64[batch, seq, k=2]",
    names_of_results_missing: "E510: graph @Model: returns 1 values, but names none",
    kept_under_another_name: "E510: graph @Blok: is kept under the name 'Block'",
    graph_without_operators: "E514: graph @Model: there is no `return`",
    number_too_large: "E512: graph @Model, %h_3 = repeat(%h): count is 9223372036854775808, which "
    "a graph cannot hold",
    attribute_of_no_kind: "E512: graph @Block, %route, %w = topk_groups(%score): k is ('k', None), "
    "which a graph cannot hold",
    weight_without_name: "E515: graph @Model: 'a b' is no name of a weight: words between dots",
    element_type: "E513: graph @Block: there is no element type f8",
    name_of_dimension: "E513: graph @Model: 'a b' is no name of a dimension",
    missing_tokens: "E513: graph @Model: dimension seq--1 has an impossible size",
    expert_that_calls: "E516: graph @Block, %made = call(%x): a block inside an expert has no name",
    circle: "E516: @Block calls @Model calls @Block: a graph cannot hold itself",
    cache_without_entries: "E518: graph @Block: cache @h is never written",
    program_without_identifier: "E510: program @a-b has no graph @Model to begin with",
}


@pytest.mark.parametrize("mutate", MUTATED, ids=lambda mutate: mutate.__name__)
def test_broken_graph_is_refused(mutate: Callable[[Program], None]) -> None:
    program = parsed(GOOD)
    mutate(program)
    assert refused(program)[0] == MUTATED[mutate]


# ---- experts after they were made one product ------------------------------------------------

REGION = GOOD[GOOD.index("  %y = experts") : GOOD.index("  return(%y)")]
GROUPED = GOOD.replace(
    REGION,
    """\
  %rows, %ends, %order = permute(%x, %route) <count=(expert=4)> : bf16[slot, hidden=8], i32[expert=4], i64[slot]
  %up = grouped_linear(%rows, %ends, @experts.*.up.weight) : bf16[slot, hidden=8]
  %y = unpermute(%up, %order, %w) : bf16[batch, seq, hidden=8]
""",  # noqa: E501
)


def test_grouped_experts_are_accepted() -> None:
    verify(parsed(GROUPED))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<stack=4>", "<stack=3>", "is there for 3 experts, of which there are 4"),
        ("%ends, @experts.*.up.weight", "%ends, @embed.weight", "there is no weight @embed.weight"),
        ("experts.*.up", "expert.up", "@expert.up.weight belongs to no expert"),
    ],
)
def test_grouped_experts_need_weights_of_all_experts(old: str, new: str, message: str) -> None:
    text = GROUPED.replace(old, new)
    if "*" not in new and "stack" not in new:
        text = text.replace(" <stack=4>", "")
    assert refused(parsed(text))[0].endswith(message)


# ---- how it is said -------------------------------------------------------------------------


def test_the_place_is_the_source_of_the_operator() -> None:
    program = parsed(GOOD.replace("eps=1e-06", "eps=1"))
    with pytest.raises(DiagnosticError) as caught:
        verify(program)
    assert render(caught.value.diagnostics).splitlines()[1:4] == [
        " --> small.graph:9:3",
        "  |",
        "9 |   %n = rms_norm(%x, @norm.weight) <eps=1> : bf16[batch, seq, hidden=8]",
    ]


def test_an_operator_without_source_is_shown_in_the_text_of_its_graph() -> None:
    program = parsed(GOOD)
    op = program.graphs["Block"].ops[3].regions[0].ops[0]
    op.spans, op.attrs = (), {"bias": True}
    with pytest.raises(DiagnosticError) as caught:
        verify(program)
    assert render(caught.value.diagnostics) == (
        "error[E512]: graph @Block, %up = linear(%z, @experts.*.up.weight): knows no attribute "
        "bias\n"
        " --> graph @Block:9:1\n"
        "  |\n"
        "9 |     %up = linear(%z, @experts.*.up.weight) <bias=true> : bf16[token, hidden=8]\n"
        "  | " + "^" * 78 + " here\n"
    )


def test_every_broken_operator_is_reported() -> None:
    text = GOOD.replace("eps=1e-06", "eps=1").replace("k=(k=2)", "k=2").replace("yield(%h_2)", "")
    assert [message[:4] for message in refused(parsed(text))] == ["E512", "E512", "E514"]


def test_shared_names_are_allowed_where_layers_differ() -> None:
    """Two repeats under one scope, one after the other, and a layer that stands alone."""
    verify(parsed(GOOD.replace("<start=0, count=2>", "<start=3, count=58>")))


@pytest.mark.slow
def test_what_pipelines_make_is_sound() -> None:
    for program in compile(load(SPECS / "deepseek_v3_tiny.yaml")).programs.values():
        verify(program)


def test_the_whole_model_is_verified_in_milliseconds() -> None:
    program = lower(load(SPECS / "deepseek_v3.yaml"))

    def once() -> float:
        start = time.perf_counter()
        verify(program)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.02
