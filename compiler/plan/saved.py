"""What the backward pass needs of the forward pass: the saved activations.

Which values these are, the operators `save` of the training program say; the passes `differentiate`
and `recompute` decide. Where their products are FP8, they are saved in the formats of the
DeepSeek-V3 report, sections 3.2.3 and 3.3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, Value, sizes_inside
from compiler.graph.types import BYTES
from compiler.ops import OPS
from compiler.ops.attention import Attention
from compiler.ops.moe import Experts
from compiler.ops.quantize import CASTS
from compiler.parallel.layout import Unit
from dsl.source import Span

# Bytes of so many elements, scales of 4 bytes for each 128 included: FP8, and the 12 bits of the
# input of the projection behind attention.
TILE = 128
FP8_BYTES = (TILE + 4, TILE)
E5M6_BYTES = (TILE * 3 // 2 + 4, TILE)

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class SavedValue:
    """A value that stays until its backward pass: `bytes` for one micro-batch.

    `span` is the equation that made it; `block` the graph that holds it.
    """

    name: str
    block: str
    bytes: int
    span: Span | None


@dataclass(frozen=True)
class Activations:
    """Of one unit and one micro-batch: what is saved, and the largest block while it runs."""

    saved: tuple[SavedValue, ...]
    working: SavedValue

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.saved)


def activations(program: Program, unit: Unit, sizes: Sizes) -> Activations:
    """What the backward pass of a unit needs, for a micro-batch of the given run-time sizes.

    `program` is the training program with its gradients. Where they were left out (`--skip`),
    everything that is computed counts as saved.
    """
    walk = _Walk(program)
    main = program.main
    for i in unit.ops:
        op = main.ops[i]
        inside = [op] if unit.layer is None else op.regions[0].ops
        walk.block(main, inside, dict(sizes))
    return Activations(tuple(one for one in walk.saved if one.bytes), walk.largest)


class _Walk:
    """Visits a block and those that it calls, with the run-time sizes of each."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.saved: list[SavedValue] = []
        self.largest = SavedValue("", "", 0, None)

    def block(self, graph: Graph, ops: Sequence[Op], sizes: dict[str, int], times: int = 1) -> None:
        """Adds what `ops`, all or some of a graph, save when they run `times` times."""
        made: dict[str, tuple[Value, Op]] = {}
        size = self._visit(graph, ops, sizes, times, made)
        # While a block runs backward, its values are there and as many gradients.
        if 2 * size > self.largest.bytes:
            self.largest = SavedValue("values and gradients", graph.name, 2 * size, graph.span)
        if not self._program.backward:
            named = [
                (n, v)
                for n, (v, op) in made.items()
                if not (OPS[op.kind].view or op.kind == "call")
            ]
        elif graph is self._program.main:
            named = []  # parts of the outermost block are graphs of their own
        else:
            named = [(v.name, v) for v in graph.saved]
        for name, value in named:
            op = made[name][1] if name in made else None
            span = op.spans[0] if op and op.spans else graph.span
            per, of = _format(value, op, graph)
            count = times * value.type.count(sizes)
            self.saved.append(SavedValue(name, graph.name, -(-count * per // of), span))

    def _visit(
        self,
        graph: Graph,
        ops: Sequence[Op],
        sizes: dict[str, int],
        times: int,
        made: dict[str, tuple[Value, Op]],
    ) -> int:
        """Bytes of all values that are made; fills in `made`, and the sizes they bring along."""
        total = 0
        for op in ops:
            site = site_of(op, graph, self._program.graphs)
            sizes.update(OPS[op.kind].sizes(site, sizes))
            if op.kind == "call":
                callee = self._program.graphs[op.text("callee")]
                self.block(callee, callee.ops, sizes_inside(callee, op, sizes), times)
            again = op.number("count") if op.kind == "repeat" else 1
            for region in op.regions:
                if op.kind == "experts":  # all of them are counted together
                    sizes.update(Experts.inner_sizes(site, sizes))
                total += self._visit(graph, region.ops, sizes, times * again, made)
            made |= {v.name: (v, op) for v in op.results}
            # A quantized copy is there for the product that reads it, and gone.
            if not (OPS[op.kind].view or op.kind in CASTS or op.regions):
                # What has no run-time dimension is the gradient of a weight, counted elsewhere.
                made_of = (v.type for v in op.results if any(d.size is None for d in v.type.dims))
                total += sum(type.bytes(sizes) for type in made_of)
        return total


def _format(value: Value, op: Op | None, graph: Graph) -> tuple[int, int]:
    """Bytes of a number of elements of a saved value that `op` made."""
    if value.type.dtype == "bf16":
        readers = {o.kind for o in graph.walk() if value in o.operands}
        routed = value.type.dims[0].name in ("slot", "token") and "unpermute" not in readers
        if routed and any(w.fp8 for name, w in graph.weights.items() if "*" in name):
            return FP8_BYTES
        attended = op is not None and issubclass(OPS[op.kind], Attention)
        if attended and any(w.fp8 for w in graph.weights.values()):
            return E5M6_BYTES
    return BYTES[value.type.dtype], 1
