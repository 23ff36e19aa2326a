"""Which weights a unit of the model holds. Experts are counted, not walked one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiler.graph.core import Graph, Op, Program
from compiler.graph.types import Type
from compiler.parallel.layout import Unit
from dsl.source import Span


@dataclass(frozen=True)
class HeldWeights:
    """`count` equal weights of a unit.

    A `*` in the published name stands for the layer; `{0..255}` for the `experts` of a layer, 0
    where the weight is not that of a routed expert, or for layers within a block. `span` is the
    equation that uses the weight; `fp8` that it has an FP8 copy.
    """

    name: str
    type: Type
    count: int
    experts: int
    trainable: bool
    span: Span | None
    fp8: bool = False

    @property
    def routed(self) -> bool:
        return self.experts > 0

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.count * self.type.count()


def weights_of(program: Program, unit: Unit) -> tuple[HeldWeights, ...]:
    """The weights that the operators of a unit use, each once, in order."""
    main = program.main
    ops: list[Op] = []
    for i in unit.ops:
        op = main.ops[i]
        ops += [op] if unit.layer is None else op.regions[0].ops
    layer = () if unit.layer is None else ("*",)
    found: dict[str, HeldWeights] = {}
    for held in _used(program, main, ops, "", 1, layer):
        found.setdefault(held.name, held)
    return tuple(found.values())


def _used(
    program: Program, graph: Graph, ops: Sequence[Op], prefix: str, count: int, around: _Stars
) -> Iterator[HeldWeights]:
    """`around` says what the stars of scopes stand for; together they are `count` modules."""
    for op in ops:
        for symbol in op.symbols:
            yield _held(graph, symbol, op, prefix, count)
        if op.callee:
            scope = f"{prefix}{_written(op.text('scope'), around)}."
            callee = program.graphs[op.callee]
            yield from _used(program, callee, callee.ops, scope, count, ())
        elif op.kind == "repeat":
            stars = (*around, f"{{{op.layers[0]}..{op.layers[-1]}}}")
            inside = op.regions[0].ops
            yield from _used(program, graph, inside, prefix, count * len(op.layers), stars)
        else:
            for region in op.regions:
                yield from _used(program, graph, region.ops, prefix, count, around)


_Stars = tuple[str, ...]


def _written(scope: str, stars: _Stars) -> str:
    """A scope with each `*` replaced; the last star belongs to the innermost repeat."""
    pieces = scope.split("*")
    used = stars[len(stars) - len(pieces) + 1 :]
    return pieces[0] + "".join(s + p for s, p in zip(used, pieces[1:], strict=True))


def _held(graph: Graph, symbol: str, op: Op, prefix: str, count: int) -> HeldWeights:
    weight = graph.weights[symbol]
    experts = weight.stack if "*" in symbol else 0
    name = symbol.replace("*", f"{{0..{weight.stack - 1}}}")
    span = op.spans[0] if op.spans else None
    times = count * max(1, experts)
    fp8 = bool(weight.fp8)
    return HeldWeights(f"{prefix}{name}", weight.type, times, experts, weight.trainable, span, fp8)
