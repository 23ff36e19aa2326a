"""What the methods of a block compute alike at their beginning, as a method of its own.

Scores, prompts and single tokens share the projections of a block; they part where one saves
activations and another remembers tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.torch.emit import Callee
from compiler.graph.core import Graph, Op, Value

LEAST = 5
"""Operators that are worth a method."""


@dataclass(frozen=True)
class Prefix:
    """`graph` computes the common beginning of some methods; `rest` is what each does after it.

    Each of `rest` begins with a call of `callee`, which names the results that it reads.
    """

    graph: Graph
    rest: Sequence[Graph]
    callees: Sequence[Callee]


def common_prefix(name: str, graphs: Sequence[Graph]) -> Prefix | None:
    """The longest common beginning of two or more graphs; None if it is not worth a method."""
    first, *others = graphs
    same = [_Same(first, other) for other in others]
    count = 0
    for ops in zip(*(graph.ops[:-1] for graph in graphs), strict=False):
        if not all(one.holds(ops[0], op) for one, op in zip(same, ops[1:], strict=True)):
            break
        count += 1
    if count < LEAST:
        return None
    itself = {v: v for v in (*first.args, *_made(first, count))}
    maps = [itself, *(one.values for one in same)]
    read = [_read_after(graph, count) for graph in graphs]
    results = [
        value
        for value in _made(first, count)
        if any(values[value] in after for values, after in zip(maps, read, strict=True))
    ]
    used = {v for op in first.ops[:count] for v in op.operands}
    arguments = [v for v in first.args if v in used]
    prefix = Graph(name, arguments, [*first.ops[:count], Op("return", results)])
    prefix.weights = first.weights
    prefix.result_names = tuple(value.name for value in results)
    rest, callees = [], []
    for graph, values, after in zip(graphs, maps, read, strict=True):
        taken = [values[value] for value in results if values[value] in after]
        call = Op(
            "call",
            [values[v] for v in arguments],
            attrs={"callee": name, "scope": ""},
            results=taken,
            spans=first.ops[0].spans,
        )
        short = Graph(graph.name, graph.args, [call, *graph.ops[count:]])
        short.weights, short.result_names = graph.weights, graph.result_names
        rest.append(short)
        callees.append(Callee(name, (), tuple(values[v] in after for v in results)))
    return Prefix(prefix, rest, callees)


def _made(graph: Graph, count: int) -> list[Value]:
    return [v for op in graph.ops[:count] for v in op.results]


def _read_after(graph: Graph, count: int) -> set[Value]:
    """Values that operators after the first `count` read, also in regions."""
    after = Graph("", ops=graph.ops[count:])
    return after.read()


class _Same:
    """Operators of two graphs side by side; `values` maps those of the first to the second's."""

    def __init__(self, first: Graph, other: Graph) -> None:
        self.values = dict(zip(first.args, other.args, strict=False))

    def holds(self, a: Op, b: Op) -> bool:
        """Whether the next operators are equal; their results correspond from then on."""
        same = (
            (a.kind, a.symbols) == (b.kind, b.symbols)
            and repr(a.attrs) == repr(b.attrs)
            and not a.regions
            and [self.values.get(v) for v in a.operands] == b.operands
            and [v.name for v in a.results] == [v.name for v in b.results]
            and a.kind not in ("call", "save")
        )
        if same:
            self.values |= dict(zip(a.results, b.results, strict=True))
        return same
