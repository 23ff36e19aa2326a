"""What the backward pass needs of the forward pass: the saved activations.

Which values these are, and in which formats, the operators `save` of the training program say; the
passes `differentiate`, `recompute`, `place_fp8` and `encode_saved` decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, Value, sizes_inside
from compiler.ops import OPS
from compiler.ops.moe import Experts
from compiler.ops.quantize import CASTS
from compiler.parallel.layout import Unit
from dsl.source import Span

Sizes = Mapping[str, int]

TILES = "slot_tile"
"""The dimension of tiles of rows that are by experts, which begin with a tile each."""


@dataclass(frozen=True)
class SavedValue:
    """A value that stays until its backward pass: `bytes` for one micro-batch.

    `span` is the equation that made it; `block` the graph that holds it. `shared` is the value of
    the outermost block that all layers get as it; `expert_weights` says that it is the weights of
    the experts that tokens go to, which come along with them to other ranks.
    """

    name: str
    block: str
    bytes: int
    span: Span | None
    shared: str = ""
    expert_weights: bool = False


@dataclass(frozen=True)
class Activations:
    """Of one unit and one micro-batch: what is saved, and the largest block while it runs.

    `operands` are bytes that products which are gradients of weights wait with, from a chunk I,
    when what was saved is dropped, to its W; `filling` those of them that fill up the rows of every
    expert to whole tiles.
    """

    saved: tuple[SavedValue, ...]
    working: SavedValue
    operands: int
    filling: int

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
    saved = tuple(one for one in walk.saved if one.bytes)
    return Activations(saved, walk.largest, walk.operands, walk.filling)


class _Walk:
    """Visits a block and those that it calls, with the run-time sizes of each."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.saved: list[SavedValue] = []
        self.largest = SavedValue("", "", 0, None)
        self.operands = self.filling = 0
        main = program.main
        self._outermost = {*main.args, *(v for op in main.ops for v in op.results)}

    def block(
        self,
        graph: Graph,
        ops: Sequence[Op],
        sizes: dict[str, int],
        times: int = 1,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        """Adds what `ops`, all or some of a graph, save when they run `times` times.

        `shared` are the arguments that all layers get, by name.
        """
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
        operands, filling = self._operands(graph, dict(sizes))
        self.operands += times * operands
        self.filling += times * filling
        weights = set(self._weights(graph))
        for name, value in named:
            op = made[name][1] if name in made else None
            span = op.spans[0] if op and op.spans else graph.span
            self.saved.append(
                SavedValue(
                    name, graph.name, times * value.type.bytes(sizes), span,
                    (shared or {}).get(name, ""), name in weights,
                )
            )  # fmt: skip

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
                given = zip(callee.args, op.operands, strict=True)
                shared = {arg.name: v.name for arg, v in given if v in self._outermost}
                self.block(callee, callee.ops, sizes_inside(callee, op, sizes), times, shared)
            again = op.number("count") if op.kind == "repeat" else 1
            for region in op.regions:
                if op.kind == "experts":  # all of them are counted together
                    sizes.update(Experts.inner_sizes(site, sizes))
                total += self._visit(graph, region.ops, sizes, times * again, made)
            made |= {v.name: (v, op) for v in op.results}
            # A quantized copy is there for the product that reads it, or for long.
            if not (OPS[op.kind].view or op.kind in (*CASTS, "pack_e5m6") or op.regions):
                # What has no run-time dimension is the gradient of a weight, counted elsewhere.
                made_of = (v.type for v in op.results if any(d.size is None for d in v.type.dims))
                total += sum(type.bytes(sizes) for type in made_of)
        return total

    def _operands(self, graph: Graph, sizes: dict[str, int]) -> tuple[int, int]:
        """Of products that are gradients of the block's weights, as `Activations` has them."""
        backward = self._program.backward_of(graph.name)
        if backward is None:
            return 0, 0
        whole: dict[Value, int] = {}
        filling: dict[Value, int] = {}
        for op in backward.walk():
            site = site_of(op, backward, self._program.graphs)
            sizes.update(OPS[op.kind].inner_sizes(site, sizes))
            if OPS[op.kind].weight_product:
                # There are tiles for all rows, and one more for every expert.
                experts = sum(v.type.count() for v in op.operands if v.type.dtype == "i32")
                for value in op.operands:
                    whole[value] = value.type.bytes(sizes)
                    if any(dim.name == TILES for dim in value.type.dims):
                        filling[value] = value.type.bytes({**sizes, TILES: experts})
            sizes.update(OPS[op.kind].sizes(site, sizes))
        return sum(whole.values()), sum(filling.values())

    def _weights(self, graph: Graph) -> Iterator[str]:
        """Saved values that are read as weights of experts, and for nothing else."""
        backward = self._program.backward_of(graph.name)
        if backward is None:
            return
        for value, saved in zip(backward.ops[0].results, graph.saved, strict=True):
            readers = [op for op in backward.walk() if value in op.operands]
            if all(op.kind == "unpermute_grad" and op.operands[-1] is value for op in readers):
                yield saved.name
