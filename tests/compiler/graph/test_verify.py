"""Every kind of broken graph is refused, with a message that says what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from compiler.graph.core import Op, Program, Value, Weight
from compiler.graph.text import parse_program
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
    "value outside of its region": (
        "return(%y)\n}", "%a = add(%y, %y) : bf16[batch, seq, hidden=8]\n return(%a)\n}",
        None,
    ),
    "name of a value taken": (
        "%w = topk", "%score = topk",
        "E511: graph @Block, %route, %score = topk_groups(%score): the name %score is taken by "
        "another value",
    ),
    "name of an argument taken": (
        "|%z: bf16[token, hidden=8]|\n    %up = linear(%z,",
        "|%n: bf16[token, hidden=8]|\n    %up = linear(%n,",
        "E511: graph @Block, %y = experts(%x, %route, %w): the name %n is taken by another value",
    ),
    "kind": (
        "rms_norm(", "layer_norm(",
        "E512: graph @Block, %n = layer_norm(%x, @norm.weight): there is no operator layer_norm",
    ),
    "number of operands": (
        "rms_norm(%x,", "rms_norm(%x, %x,",
        "E512: graph @Block, %n = rms_norm(%x, %x, @norm.weight): takes 1 operands (x), got 2",
    ),
    "number of weights": (
        "linear(%n, @gate.weight)", "linear(%n)",
        "E512: graph @Block, %score = linear(%n): takes the weights weight, got 0",
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
        "E512: graph @Block, %n = rms_norm(%x, @norm.weight): eps is nan, and not float",
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
    ),
    "dimensions that do not meet": (
        "@norm.weight : bf16[hidden=8]", "@norm.weight : bf16[hidden=9]",
        "E513: graph @Block, %n = rms_norm(%x, @norm.weight): rms_norm expects [hidden (9)], got "
        "hidden (8)",
    ),
    "number of results": (
        "%route, %w = topk_groups", "%route, %w, %v = topk_groups",
        None,
    ),
    "what a region takes": (
        "%z: bf16[token, hidden=8]", "%z: f32[token, hidden=8]",
        None,
    ),
    "attributes that make no sense together": (
        "<k=(k=2),", "<k=(k=2, l=2),",
        "E513: graph @Block, %route, %w = topk_groups(%score): its operands and attributes make "
        "no sense together",
    ),
    "dimension without a size": (
        "%tokens: i64[batch, seq]", "%tokens: i64[batch, length]",
        "E513: graph @Model: dimension length has no size",
    ),
    "dimension of size 0": (
        "@embed.weight : bf16[vocab=32,", "@embed.weight : bf16[vocab=0,",
        "E513: graph @Model: dimension vocab=0 has an impossible size",
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
        "graph @Block(%x: bf16[batch, seq, hidden=8])", "graph @Block(%x: bf16[batch, hidden=8])",
        None,
    ),
    "recursion": (
        "%n = rms_norm(%x,",
        "%m = call(%x) <callee=Block, scope=more> : bf16[batch, seq, hidden=8]\n  %n = rms_norm(%m,",
        "E516: @Block calls @Block: a graph cannot hold itself",
    ),
    "call inside an expert": (
        "%up = linear(%z, @experts.*.up.weight) : bf16[token, hidden=8]",
        "%up = call(%z) <callee=Block, scope=experts.0> : bf16[token, hidden=8]",
        None,
    ),
    "scope of a repeat without `*`": (
        "scope=layers.*", "scope=layers.0",
        "E517: graph @Model, %h_2 = call(%h_1): scope layers.0 has 0 `*` for 1 repeats around it",
    ),
    "`*` outside of a repeat": (
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
        "E518: graph @Model, %c = cache_entry(%h_2): stands in a region; a cache belongs to a block",
    ),
}  # fmt: skip
