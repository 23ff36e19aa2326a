"""Where a sum over spread dimensions goes: what is partial, and who may read it."""

from __future__ import annotations

import pytest

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Value, Weight
from compiler.graph.types import Type, parse_type
from compiler.ops.base import PartialSum, TypeMismatch

X = "f32[batch@(replica, expert), seq, hidden=8]"


def results(kind: str, *operands: str, weight: str = "", **attrs: object) -> list[str]:
    """The types of what an operator makes of operands of these types."""
    args = [Value(f"x{i}", parse_type(t)) for i, t in enumerate(operands)]
    graph = Graph("G", args)
    if weight:
        graph.weights["w"] = Weight(parse_type(weight))
    made = Builder(graph, {}).add(kind, args, ["w"] if weight else [], **attrs)  # type: ignore[arg-type]
    return [str(value.type) for value in made]


def test_what_keeps_a_spread_dimension_is_no_sum() -> None:
    assert results("silu", X) == [X]
    assert results("linear", X, weight="f32[out=2, hidden=8]") == [X.replace("hidden=8", "out=2")]


def test_a_sum_over_a_spread_dimension_is_partial() -> None:
    assert results("sum", X) == ["f32[] partial(replica, expert)"]
    labels = "i64[batch@expert, seq]"
    assert results("count_labels", labels) == ["f32[] partial(expert)"]
    assert results("expert_load", labels, count=("n", 4)) == ["i64[n=4] partial(expert)"]


def test_linear_operators_pass_partial_sums_on() -> None:
    part = "f32[a=2] partial(expert)"
    assert results("scale", part, by=2.0) == [part]
    assert results("add", part, part) == [part]
    assert results("mul", part, "f32[a=2]") == results("mul", "f32[a=2]", part) == [part]
    assert results("div", part, "f32[a=2]") == [part]


@pytest.mark.parametrize(
    ("kind", "operands"),
    [
        ("silu", ["f32[a=2] partial(expert)"]),
        ("add", ["f32[] partial(expert)", "f32[]"]),
        ("add", ["f32[] partial(expert)", "f32[] partial(replica)"]),
        ("mul", ["f32[] partial(expert)", "f32[] partial(expert)"]),
        ("mul", ["f32[batch@expert]", "f32[] partial(expert)"]),
        ("div", ["f32[]", "f32[] partial(expert)"]),
    ],
)
def test_others_need_the_whole(kind: str, operands: list[str]) -> None:
    with pytest.raises(PartialSum, match=f"{kind} needs the whole of what is a partial sum over"):
        results(kind, *operands)


def test_slots_are_spread_as_the_tokens_and_counted_for_each_experts_rank() -> None:
    x, route = "f32[arrived@(replica, expert), hidden=8]", "i64[arrived@(replica, expert), k=2]"
    assert results("permute", x, route, count=("n", 4)) == [
        "f32[slot@(replica, expert), hidden=8]",
        "i32[n=4@expert]",
        "i64[slot@(replica, expert)]",
    ]


GROUP = {"axes": ("replica", "expert"), "ranks": 4, "nodes": 2}


def test_collectives_make_sums_whole() -> None:
    part = "f32[a=5, b=2] partial(replica, expert)"
    assert results("all_reduce", part, **GROUP) == ["f32[a=5, b=2]"]
    one = {**GROUP, "axes": ("expert",)}
    assert results("all_reduce", part, **one) == ["f32[a=5, b=2] partial(replica)"]
    (shard,) = results("reduce_scatter", part, **GROUP)
    assert shard == "f32[shard=3@(replica, expert)]"
    assert results("all_gather", shard, **GROUP, into=("a", 5, "b", 2)) == ["f32[a=5, b=2]"]
    with pytest.raises(TypeMismatch, match="of what is no such sum"):
        results("all_reduce", "f32[a=5]", **GROUP)
    with pytest.raises(TypeMismatch, match="takes a share of 4"):
        results("all_gather", shard, **GROUP, into=("a", 8, "b", 2))


def test_shards_of_experts_stay_with_their_ranks() -> None:
    """Gradients of experts are summed over replicas only."""
    group = {"axes": ("replica",), "ranks": 2, "nodes": 2}
    (shard,) = results("reduce_scatter", "f32[n=4@expert, a=3] partial(replica)", **group)
    assert shard == "f32[shard=6@(replica, expert)]"
    assert results("all_gather", shard, **group, into=("n", 4, "a", 3)) == ["f32[n=4@expert, a=3]"]


def test_tokens_arrive_and_go_back() -> None:
    sizes = {"count": 8, "ranks": 4, "nodes": 2, "limit": 2}
    route, weight = "i64[batch@expert, seq, k=2]", "f32[batch@expert, seq, k=2]"
    x, *rest, handle = results("dispatch", X.replace("(replica, expert)", "expert"), weight, route,
                               **sizes)  # fmt: skip
    assert (x, handle) == ("f32[arrived@expert, hidden=8]", "i64[arrived@expert]")
    assert rest == ["f32[arrived@expert, k=2]", "i64[arrived@expert, k=2]"]
    back = results("combine", x, x, handle, route, **sizes)
    assert back == 2 * ["f32[batch@expert, seq, hidden=8]"]
    assert results("dispatch_again", back[0], handle, **sizes, k=2) == [x]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 6}, "6 experts on 4 ranks of 2 nodes: not evenly"),
        ({"nodes": 3}, "8 experts on 4 ranks of 3 nodes: not evenly"),
        ({"limit": 3}, "limit is 3, of 2 nodes"),
    ],
)
def test_experts_ranks_and_nodes_go_into_each_other(change: dict[str, int], words: str) -> None:
    sizes = {"count": 8, "ranks": 4, "nodes": 2, "limit": 2, **change}
    with pytest.raises(TypeMismatch, match=words):
        results("dispatch", "f32[batch, h=8]", "i64[batch, k=2]", **sizes)


def test_recv_has_the_type_that_it_names() -> None:
    assert results("recv", pipeline=0, type=X) == [X]
    with pytest.raises(TypeMismatch, match="is no type"):
        results("recv", pipeline=0, type="f32")
    assert Type("f32") == parse_type("f32[]")
