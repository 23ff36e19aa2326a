"""What a graph knows of its values, and a program of its graphs."""

from __future__ import annotations

from compiler.graph.core import list_of
from compiler.graph.parse import parse_program
from dsl.source import Source

T = "f32[batch, n=4]"
TEXT = f"""\
program @p root @Main

graph @Inner(%x: {T}) -> (y: {T}) {{
  %a = silu(%x) : {T}
  %y = mul(%a, %a) : {T}
  return(%y)
}}

graph @Main(%x: {T}) -> (y: {T}) {{
  %h = repeat(%x) <start=0, count=2> {{ |%z: {T}|
    %i = call(%z) <callee=Inner, scope=layers.*> : {T}
    yield(%i)
  }} : {T}
  return(%h)
}}
"""


def test_values_know_their_producer_and_readers_and_graphs_their_calls() -> None:
    program = parse_program(Source("p.graph", TEXT))
    inner, main = program.graphs["Inner"], program.main
    silu, mul, end = inner.ops
    assert inner.producers() == {silu.result: silu, mul.result: mul}
    # Once for each operand; what nothing reads has no entry.
    assert inner.uses() == {inner.args[0]: [silu], silu.result: [mul, mul], mul.result: [end]}
    repeat, _ = main.ops
    call, _ = repeat.regions[0].ops
    assert main.producers() == {repeat.result: repeat, call.result: call}
    assert main.uses()[repeat.regions[0].args[0]] == [call]
    assert (call.callee, repeat.callee) == ("Inner", "")
    assert list(program.calls_of("Inner")) == [(main, call)] and not [*program.calls_of("Main")]
    assert list_of(main, call) is repeat.regions[0].ops
