"""Making operators: types of results are computed here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    weights: list[Type] = []
    for symbol in op.symbols:
        if symbol not in graph.weights:
            raise TypeMismatch(f"there is no weight @{symbol}")
        weights.append(graph.weights[symbol].type)
    callee: Signature | None = None
    if op.kind == "call":
        called = graphs.get(op.callee)
        if called is None:
            raise TypeMismatch(f"there is no graph @{op.callee}")
        callee = (tuple(v.type for v in called.args), tuple(v.type for v in called.results))
    regions = tuple(
        (tuple(v.type for v in r.args), tuple(v.type for v in r.yielded)) for r in op.regions
    )
    saved = tuple(v.type for v in op.results) if op.kind == "saved" else ()
    operands = tuple(v.type for v in op.operands)
    return Site(operands, tuple(weights), op.attrs, regions, callee, saved)


def infer(op: Op, graph: Graph, graphs: Mapping[str, Graph]) -> tuple[Type, ...]:
    """Types of an operator's results. Raises `TypeMismatch`."""
    site, operator = site_of(op, graph, graphs), OPS[op.kind]
    return placed(operator, site, operator.infer(site))


class Builder:
    """Appends operators to a list and gives their results unique names."""

    def __init__(self, graph: Graph, graphs: Mapping[str, Graph]) -> None:
        self.graph = graph
        self.graphs = graphs
        self.ops: list[Op] = graph.ops
        self.tried: dict[str, int] = {}  # the number to go on from, by base
        self.names = {v.name for v in graph.args}
        self.names |= {v.name for op in graph.walk() for v in op.results}
        self.names |= {v.name for op in graph.walk() for r in op.regions for v in r.args}

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
