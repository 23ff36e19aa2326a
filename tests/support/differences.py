"""Where two programs first differ. Spans do not count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from compiler.graph.core import Graph, Op, Program, Value
from compiler.graph.text import link_lines, print_op, print_weight

# A place, which fact of it, and its value. Two programs are equal when all facts are.
Fact = tuple[str, str, object]


def equal(a: Program, b: Program) -> bool:
    """Whether the two have the same graphs, operators, names and numbers, in the same order."""
    return first_difference(a, b) is None


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
