"""Memory of a graph: by hand for small ones, and what must hold for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.analysis.lifetimes import Life, color, plan_memory
from compiler.graph.core import Program, Value
from compiler.graph.parse import parse_program
from compiler.graph.types import RUNTIME_DIMS, Type
from compiler.pipeline import after
from dsl.load import load
from dsl.source import Source
from tests.support.golden import Golden
from tests.support.places import TINY
from tests.support.strategies import programs

# More of everything than a type may lack.
SIZES = dict.fromkeys(RUNTIME_DIMS, 64)

SMALL = """
program @p root @Top

graph @Inner(%x: f32[batch]) -> (z: f32[batch]) {
  %y = silu(%x) : f32[batch]
  %w = sigmoid(%y) : f32[batch]
  %z = mul(%y, %w) : f32[batch]
  return(%z)
}

graph @Top(%x: f32[batch]) -> (d: f32[batch]) {
  %a = silu(%x) : f32[batch]
  %b = silu(%a) : f32[batch]
  %c = repeat(%b) <start=0, count=3> { |%h: f32[batch]|
    %i = call(%h) <callee=Inner, scope=layers.*> : f32[batch]
    %j = add(%i, %a) : f32[batch]
    yield(%j)
  } : f32[batch]
  %d = silu(%c) : f32[batch]
  return(%d)
}
"""


def small() -> Program:
    return parse_program(Source("small.graph", SMALL))


def test_lifetimes_peak_and_buffers_by_hand() -> None:
    """A value is 8 bytes. Operators: 0 a, 1 b, 2 repeat, 3 i, 4 j, 5 yield, 6 d, 7 return."""
    inner = plan_memory(small(), "Inner", {"batch": 2})
    assert {str(x.value): (x.start, x.end) for x in inner.lives} == {
        "%y": (0, 2), "%w": (1, 2), "%z": (2, 3),
    }  # fmt: skip
    assert (inner.peak, inner.shared) == (24, 24)
    top = plan_memory(small(), "Top", {"batch": 2})
    # `a` is read in every turn of the loop; `b` is where the first turn begins; `c` is `j`.
    assert {str(x.value): (x.start, x.end) for x in top.lives} == {
        "%a": (0, 5), "%b": (1, 3), "%i": (3, 4), "%j": (4, 6), "%d": (6, 7),
    }  # fmt: skip
    # At the call: a, b, its result, and the 16 bytes that it takes besides.
    assert top.peak == 8 + 8 + 8 + 16
    assert top.at is not None and top.at.kind == "call"
    assert [[str(x.value) for x in b.lives] for b in top.buffers] == [
        ["%a", "%d"], ["%b", "%j"], ["%i"],
    ]  # fmt: skip


def test_memory_of_a_layer_of_experts(golden: Golden) -> None:
    program = after(load(TINY), "train", "fuse_experts")
    plan = plan_memory(program, "DeepSeekMoE", {"batch": 1, "seq": 128})
    golden("memory/deepseek_moe.txt", str(plan))


intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(1, 5)), max_size=30
)


def lives_of(spans: list[tuple[int, int, int]], equal: bool) -> list[Life]:
    value = Value("x", Type("f32"))
    return [Life(value, 1 if equal else size, at, at + length) for at, length, size in spans]


@given(intervals, st.booleans())
def test_values_in_a_buffer_never_live_at_once(
    spans: list[tuple[int, int, int]], equal: bool
) -> None:
    lives = lives_of(spans, equal)
    buffers = color(lives)
    assert sorted(map(id, lives)) == sorted(id(x) for b in buffers for x in b.lives)
    for buffer in buffers:
        assert all(x.bytes <= buffer.bytes for x in buffer.lives)
        assert all(a.end < b.start for a, b in zip(buffer.lives, buffer.lives[1:], strict=False))
    most = max((sum(x.bytes for x in lives if x.start <= t <= x.end) for t in range(50)), default=0)
    total = sum(buffer.bytes for buffer in buffers)
    assert most <= total <= sum(x.bytes for x in lives)
    assert not equal or total == most


@pytest.mark.slow
@given(programs())
def test_memory_of_any_program(program: Program) -> None:
    for name, graph in program.graphs.items():
        plan = plan_memory(program, name, SIZES)
        assert max([0, *(x.bytes for x in plan.lives)]) <= plan.peak or not graph.ops
        assert plan.shared <= sum(x.bytes for x in plan.lives)
        order = [op for op in graph.walk()]
        assert all(0 <= x.start <= x.end < len(order) for x in plan.lives)
