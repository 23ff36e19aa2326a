"""Making operators: types of results are computed here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache

from compiler.graph.core import Attr, Graph, Op, Region, Value
from compiler.graph.placement import placed
from compiler.graph.types import Type
from compiler.ops import OPS
from compiler.ops.base import Signature, Site, TypeMismatch
from dsl.source import Span


def site_of(op: Op, graph: Graph, graphs: Mapping[str, Graph]) -> Site:
    """The place of an operator, as its type and cost rules see it.

    Raises `TypeMismatch` where it names a weight or a graph that does not exist.
    """
    types, weights, regions, callee, saved = _types_around(op, graph, graphs)
    return Site(types, weights, op.attrs, regions, callee, saved)


# Types of operands and weights, of regions, of what is called, and of what was saved.
_TypesAround = tuple[
    tuple[Type, ...], tuple[Type, ...], tuple[Signature, ...], Signature | None, tuple[Type, ...]
]


def _types_around(op: Op, graph: Graph, graphs: Mapping[str, Graph]) -> _TypesAround:
    for symbol in op.symbols:
        if symbol not in graph.weights:
            raise TypeMismatch(f"there is no weight @{symbol}")
    callee: Signature | None = None
    if op.kind == "call":
        called = graphs.get(op.callee)
        if called is None:
            raise TypeMismatch(f"there is no graph @{op.callee}")
        callee = (_types(called.args), _types(called.results))
    regions = tuple([(_types(r.args), _types(r.yielded)) for r in op.regions])
    saved = _types(op.results) if op.kind == "saved" else ()
    weights = tuple([graph.weights[symbol].type for symbol in op.symbols])
    return _types(op.operands), weights, regions, callee, saved


def _types(values: Sequence[Value]) -> tuple[Type, ...]:
    return tuple([value.type for value in values])


def infer(op: Op, graph: Graph, graphs: Mapping[str, Graph]) -> tuple[Type, ...]:
    """Types of an operator's results. Raises `TypeMismatch`."""
    return _infer(op.kind, tuple(op.attrs.items()), _types_around(op, graph, graphs))


@cache
def _infer(
    kind: str, attrs: tuple[tuple[str, Attr], ...], around: _TypesAround
) -> tuple[Type, ...]:
    """Types of the results of an operator at such a site: after most passes it is there again."""
    types, weights, regions, callee, saved = around
    site, operator = Site(types, weights, dict(attrs), regions, callee, saved), OPS[kind]
    return placed(operator, site, operator.infer(site))


def value_names(graph: Graph) -> set[str]:
    """The names of all values of a graph, those inside of regions included."""
    names = {v.name for v in graph.args}
    for op in graph.walk():
        names.update([v.name for v in op.results])
        for region in op.regions:
            names.update([v.name for v in region.args])
    return names


class Builder:
    """Appends operators to a list and gives their results unique names."""

    def __init__(
        self, graph: Graph, graphs: Mapping[str, Graph], names: Set[str] | None = None
    ) -> None:
        """`names` are those of the graph's values, where they are known."""
        self.graph = graph
        self.graphs = graphs
        self.ops: list[Op] = graph.ops
        self.tried: dict[str, int] = {}  # the number to go on from, by base
        self.names = value_names(graph) if names is None else {*names}

    def unique(self, base: str) -> str:
        """`base`, or `base_2`, `base_3`, .. where it is taken; always an identifier."""
        # Wishes come from names of weights, which hold numbers and `*`.
        base = re.sub("_?[^A-Za-z0-9_]+_?", "_", base)
        base = f"_{base}" if not base or base[0].isdigit() else base
        name, n = base, self.tried.get(base, 2)
        while name in self.names:
            name = f"{base}_{n}"
            n += 1
        self.tried[base] = max(n - 1, 2)
        self.names.add(name)
        return name

    def value(self, base: str, type: Type) -> Value:
        return Value(self.unique(base), type)

    @contextmanager
    def into(self, ops: list[Op]) -> Iterator[None]:
        """Lets `add` append to another list meanwhile, such as that of a region."""
        outer, self.ops = self.ops, ops
        try:
            yield
        finally:
            self.ops = outer

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        /,
        *,
        names: Sequence[str] = (),
        regions: Sequence[Region] = (),
        spans: Sequence[Span] = (),
        **attrs: Attr,
    ) -> list[Value]:
        """The results of a new operator at the end. Raises `TypeMismatch`, and then adds nothing.

        `names` are wishes for the names of the results; the first serves those without one.
        """
        op = Op(kind, list(operands), tuple(symbols), attrs, list(regions), [], tuple(spans))
        types = infer(op, self.graph, self.graphs)
        wishes = [*names, *([names[0] if names else kind] * (len(types) - len(names)))]
        op.results = [self.value(n, t) for n, t in zip(wishes, types, strict=False)]
        self.ops.append(op)
        return op.results
