"""Whether graphs and programs are equal. Spans do not count."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Attr, Graph, Op, Program, Region, Value
from compiler.graph.text import link_lines


def equal_links(a: Program, b: Program) -> bool:
    """Whether two programs say the same of their graphs together."""
    return _links(a) == _links(b)


def _links(program: Program) -> tuple[object, ...]:
    return program.name, program.root, [*program.graphs], [*link_lines(program)]


def changed_graphs(before: Program, after: Program) -> set[str]:
    """Names of the graphs that differ, or that only one of the programs has."""
    a, b = before.graphs, after.graphs
    return {
        name
        for name in {**a, **b}
        if not (name in a and name in b and equal_graphs(a[name], b[name]))
    }


def equal_graphs(a: Graph, b: Graph) -> bool:
    """Whether two graphs have the same operators, names and numbers, in the same order.

    Values correspond one to one, so that a graph equal to a sound one is sound.
    """
    pairs = _Pairs()
    return _head(a) == _head(b) and pairs.values(a.args, b.args) and pairs.ops(a.ops, b.ops)


def _head(graph: Graph) -> tuple[object, ...]:
    weights, caches = tuple(graph.weights.items()), tuple(graph.caches.items())
    return graph.name, graph.about, graph.result_names, weights, caches


class _Pairs:
    """Values of one graph, and those of another that are in the same places."""

    def __init__(self) -> None:
        self._other: dict[Value, Value] = {}

    def values(self, a: Sequence[Value], b: Sequence[Value]) -> bool:
        return len(a) == len(b) and all(map(self._value, a, b))

    def _value(self, a: Value, b: Value) -> bool:
        if a in self._other:
            return self._other[a] is b
        self._other[a] = b
        return a.name == b.name and a.type == b.type

    def ops(self, a: Sequence[Op], b: Sequence[Op]) -> bool:
        return len(a) == len(b) and all(map(self._op, a, b))

    def _op(self, a: Op, b: Op) -> bool:
        return (
            (a.kind, a.symbols, [*a.attrs]) == (b.kind, b.symbols, [*b.attrs])
            and all(map(_equal_attributes, a.attrs.values(), b.attrs.values()))
            and self.values(a.operands, b.operands)
            and len(a.regions) == len(b.regions)
            and all(map(self._region, a.regions, b.regions))
            and self.values(a.results, b.results)
        )

    def _region(self, a: Region, b: Region) -> bool:
        return self.values(a.args, b.args) and self.ops(a.ops, b.ops)


def _equal_attributes(a: Attr, b: Attr) -> bool:
    # `repr` distinguishes 1, 1.0 and True.
    return a is b or repr(a) == repr(b)
