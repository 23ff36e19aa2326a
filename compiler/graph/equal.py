"""Whether two programs say the same, and where they first do not. Spans do not count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from compiler.graph.core import Attr, Graph, Op, Program, Region, Value
from compiler.graph.text import link_lines, print_op, print_weight

# A place, what is told of it, and how it is there. Two programs are equal when all facts are.
Fact = tuple[str, str, object]


def equal(a: Program, b: Program) -> bool:
    """Whether the two have the same graphs, operators, names and numbers, in the same order."""
    return first_difference(a, b) is None


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
    # `repr` tells 1, 1.0 and True apart.
    return a is b or repr(a) == repr(b)


def first_difference(a: Program, b: Program) -> str | None:
    """One line on the first fact in which the programs differ; None when they are equal."""
    # A list that ends earlier says so, hence facts that differ are about the same place.
    for (place, what, first), (_, _, second) in zip(_program(a), _program(b), strict=True):
        if first != second:
            return f"{place}: {what} {_shown(first)} in the first, {_shown(second)} in the second"
    return None


def _program(program: Program) -> Iterator[Fact]:
    place = "program"
    yield place, "name is", program.name
    yield place, "root is", program.root
    yield from _list(place, "line", link_lines(program))
    yield from _list(place, "graph", (f"@{name}" for name in program.graphs))
    for name, graph in program.graphs.items():
        yield from _graph(f"graph @{name}", graph)


def _graph(place: str, graph: Graph) -> Iterator[Fact]:
    yield place, "name is", graph.name
    yield place, "about is", graph.about
    yield from _list(place, "argument", map(_value, graph.args))
    yield from _list(place, "result", graph.result_names)
    yield from _list(place, "weight", (print_weight(n, w) for n, w in graph.weights.items()))
    yield from _list(place, "cache", (f"@{n} : {c.type}" for n, c in graph.caches.items()))
    yield from _ops(place, graph.ops)


def _ops(place: str, ops: Sequence[Op]) -> Iterator[Fact]:
    # The lines come first, so that an operator that was added or lost is named itself.
    yield from _list(place, "operator", map(print_op, ops))
    for op in ops:
        here = f"{place}, {print_op(op)}"
        yield from _list(here, "operand", map(_value, op.operands))
        yield from _list(here, "result", map(_value, op.results))
        # `repr` tells 1, 1.0 and True apart.
        yield from _list(here, "attribute", (f"{k} = {v!r}" for k, v in op.attrs.items()))
        yield here, "number of regions is", len(op.regions)
        for i, region in enumerate(op.regions, start=1):
            inside = f"{here}, region {i}"
            yield from _list(inside, "argument", map(_value, region.args))
            yield from _ops(inside, region.ops)


def _list(place: str, what: str, items: Iterable[str]) -> Iterator[Fact]:
    n = 0
    for n, item in enumerate(items, start=1):
        yield place, f"{what} {n} is", item
    yield place, f"{what} {n + 1} is", None


def _value(value: Value) -> str:
    return f"{value}: {value.type}"


def _shown(value: object) -> str:
    return "missing" if value is None else str(value)
