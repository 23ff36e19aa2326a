"""Products with the same input as one: a wider product, cut into the former results.

q_a with kv_a of latent attention, q with k and v, gate with up. The weights of such a product lie
behind one another in memory, in every program of the model alike. This holds because the pass comes
first in every pipeline and so decides on the same graph, and because it joins weights only if no
program needs one without the others:

- each is used once in its graph, and is no tensor of which checkpoints hold a copy;
- what follows from one product follows from the others, so that they are dropped together or not;
- decoding does not take one apart (`absorb`).

What is computed in another element type than that of its weight, as gates are, stays by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Value, copy_program, op_lists
from compiler.ops import OPS
from compiler.ops.base import dims_attr
from compiler.passes.absorb import ABSORB
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description

Sinks = frozenset[tuple[Op, int]]


def _run(program: Program, description: Description) -> Sequence[Miss]:
    absorbed = copy_program(program)
    ABSORB.run(absorbed, description)
    for name, graph in program.graphs.items():
        alone = {s for op in absorbed.graphs[name].walk() for s in _apart(op)}
        alone |= {s for s, n in _uses(graph).items() if n > 1}
        alone |= set(program.aliases.values()) if graph is program.main else set()
        joinable = _Joinable(graph, alone)
        for ops in op_lists(graph):
            groups: dict[object, list[Op]] = {}
            for op in ops:
                if op.kind == "linear" and joinable(op):
                    groups.setdefault(joinable.key(op), []).append(op)
            for group in groups.values():
                if len(group) > 1:
                    _join(graph, program, ops, group)
    return ()


FUSE_PROJECTIONS = Pass(
    "fuse_projections",
    "projections of the same input in one product, whose weights lie together",
    _run,
    requires="the lowered program, so that all programs join the same weights",
    ensures="one linear for all projections of a value that no program needs apart",
)


def _uses(graph: Graph) -> Counter[str]:
    return Counter(symbol for op in graph.walk() for symbol in op.symbols)


def _apart(op: Op) -> tuple[str, ...]:
    """Weights that decoding reads in parts."""
    return op.symbols if op.kind == "head_linear" else ()


@dataclass
class _Joinable:
    """Which products of a graph may be joined, and with which others."""

    graph: Graph
    alone: set[str]

    def __post_init__(self) -> None:
        self.uses = self.graph.uses()

    def __call__(self, op: Op) -> bool:
        symbol, *more = op.symbols
        weight = self.graph.weights[symbol]
        *_, module, last = ("", *symbol.split("."))
        named = last == "weight" and bool(module) and not module.isdigit()
        same_type = weight.type.dtype == op.operands[0].type.dtype
        return not more and named and same_type and symbol not in self.alone

    def key(self, op: Op) -> object:
        """Equal for products that may be joined: input, place, kind, and what they are for."""
        (symbol,) = op.symbols
        weight = self.graph.weights[symbol]
        group = symbol.split(".")[:-2]
        kind = (weight.stack, weight.trainable, weight.fp8)
        return (op.operands[0], *group, kind, self._sinks(op))

    def _sinks(self, op: Op) -> Sinks:
        """Where everything that follows from `op` ends: operands of calls, regions and effects."""
        seen: set[Value] = set()
        ends: set[tuple[Op, int]] = set()
        todo = list(op.results)
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            for reader in self.uses.get(value, ()):
                if reader.regions or not OPS[reader.kind].pure:
                    ends.update((reader, i) for i, v in enumerate(reader.operands) if v is value)
                else:
                    todo += reader.results
        return frozenset(ends)


def _join(graph: Graph, program: Program, ops: list[Op], group: Sequence[Op]) -> None:
    """One product and a split in place of the first of a group; the others go."""
    builder = Builder(graph, program.graphs)
    builder.ops = []
    symbols = [op.symbols[0] for op in group]
    spans = tuple(dict.fromkeys(span for op in group for span in op.spans))
    name = "_".join(op.result.name for op in group)
    (joined,) = builder.add("linear", group[0].operands, symbols, names=[name], spans=spans)
    into = dims_attr(*(op.result.type.last for op in group))
    split = Op("split", [joined], (), {"into": into}, [], [op.result for op in group], spans)
    at = ops.index(group[0])
    ops[at:at] = [*builder.ops, split]
    for op in group:
        ops.remove(op)
