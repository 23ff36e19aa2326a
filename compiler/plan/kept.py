"""What the backward pass needs of the forward pass: the activations that are kept.

An estimate from the forward graph by the recipe of the DeepSeek-V3 report, sections 3.2.3 and
3.3.3: outputs of norms, of SwiGLU and of up-projections from a latent are computed again, and so
are the outputs of routed experts, which the gradient of the gate reads. Inputs of products are
kept, in FP8 where the policy has FP8 products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, Region, Value
from compiler.graph.types import BYTES, FLOATS
from compiler.ops import OPS
from compiler.ops.moe import Experts
from compiler.plan.layout import Unit
from dsl.source import Span

# Which operands the gradient of an operator reads; those of other kinds read none.
READS: Mapping[str, tuple[int, ...]] = {
    "linear": (0,),
    "grouped_linear": (0,),
    "rms_norm": (0,),
    "silu": (0,),
    "mul": (0, 1),
    "div": (0, 1),
    "attention": (0, 1, 2),
    "cross_entropy": (0,),
    "sequence_balance_loss": (0,),
    "topk_groups": (0,),
    "rotate": (1, 2),
}
# Kinds whose gradient reads their own result.
READS_RESULT = ("attention", "sigmoid", "softmax")
# Kinds that only show their operands in another shape, and those that are cheap to repeat.
VIEWS = ("split", "flatten", "unflatten", "broadcast", "concat", "drop_first", "drop_last")
REPEATED = ("rms_norm", "silu", "mul", "div", "scale", "cast", "rotate", "rope_table")

# Bytes of an element by where it is kept, scales of 4 bytes for each 128 included: FP8, and the
# 12 bits of the input of the projection after attention (report, section 3.3.3).
TILE = 128
FP8_BYTES = (TILE + 4, TILE)
E5M6_BYTES = (TILE * 3 // 2 + 4, TILE)

Sizes = Mapping[str, int]
Readers = frozenset[str]


@dataclass(frozen=True)
class Kept:
    """A value that stays until its backward pass: `bytes` for one micro-batch.

    `span` is the equation that made it; `block` the graph that holds it.
    """

    name: str
    block: str
    bytes: int
    span: Span | None


@dataclass(frozen=True)
class Activations:
    """Of one unit and one micro-batch: what is kept, and the largest block while it runs."""

    kept: tuple[Kept, ...]
    working: Kept

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.kept)


def activations(program: Program, unit: Unit, sizes: Sizes, *, fp8: bool) -> Activations:
    """What the backward pass of a unit needs, for a micro-batch of the given run-time sizes."""
    main = program.main
    ops = [op for i in unit.ops for op in _inside(main.ops[i], unit)]
    walk = _Walk(program, fp8)
    found = walk.visit(main, ops, dict(sizes))
    walk.grow(main, found.values)
    given = set(main.args)
    outer = [
        walk.kept(main, value, readers, sizes, main.ops[unit.ops[0]])
        for value, readers in found.outer.items()
        if value not in given
    ]
    kept = (*found.kept, *outer)
    return Activations(tuple(one for one in kept if one.bytes), walk.largest)


def _inside(op: Op, unit: Unit) -> Sequence[Op]:
    return [op] if unit.layer is None else op.regions[0].ops


@dataclass
class _Found:
    """Of a list of operators: what they keep, the values from outside that they need, with the
    operators that read them, and the bytes of all their values, those of regions included."""

    kept: list[Kept] = field(default_factory=list)
    outer: dict[Value, Readers] = field(default_factory=dict)
    values: int = 0


class _Walk:
    """Visits blocks from the outside in; each block tells which of its arguments it needs kept."""

    def __init__(self, program: Program, fp8: bool) -> None:
        self._program = program
        self._fp8 = fp8
        self.largest = Kept("", "", 0, None)

    def visit(self, graph: Graph, ops: Sequence[Op], sizes: dict[str, int]) -> _Found:
        """What `ops` need; `sizes` are the run-time sizes around them."""
        found = _Found()
        for op in ops:
            self._needs(graph, op, sizes, found)
        for op in reversed(ops):
            for value in op.results:
                readers = found.outer.pop(value, None)
                if readers is None or value.type.dtype not in FLOATS:
                    continue
                if self._is_repeated(graph, op):
                    passed = readers if op.kind in VIEWS else frozenset((op.kind,))
                    _add(found.outer, op.operands, passed)
                else:
                    found.kept.append(self.kept(graph, value, readers, sizes, op))
        found.outer = {v: r for v, r in found.outer.items() if v.type.dtype in FLOATS}
        return found

    def grow(self, graph: Graph, values: int) -> None:
        """While a block runs backward, its values are there and as many gradients."""
        if 2 * values > self.largest.bytes:
            self.largest = Kept("values and gradients", graph.name, 2 * values, graph.span)

    def _needs(self, graph: Graph, op: Op, sizes: dict[str, int], found: _Found) -> None:
        """Adds what the gradient of one operator reads."""
        site = site_of(op, graph, self._program.graphs)
        sizes.update(OPS[op.kind].sizes(site, sizes))
        if op.kind not in VIEWS and not op.regions:
            found.values += sum(v.type.bytes(sizes) for v in op.results if v.type.dtype in FLOATS)
        if op.kind == "call":
            self._call(op, sizes, found)
        for region in op.regions:
            around = Experts.inner_sizes(site, sizes) if op.kind == "experts" else dict(sizes)
            self._region(graph, op, region, around, found)
        reads = frozenset((op.kind,))
        _add(found.outer, [op.operands[i] for i in READS.get(op.kind, ())], reads)
        if op.kind in READS_RESULT:
            _add(found.outer, op.results, reads)

    def _call(self, op: Op, sizes: Sizes, found: _Found) -> None:
        callee = self._program.graphs[str(op.attrs["callee"])]
        inner = self.visit(callee, callee.ops, _bound(op, callee, sizes))
        self.grow(callee, inner.values)
        found.kept += inner.kept
        for formal, actual in zip(callee.args, op.operands, strict=True):
            if formal in inner.outer:
                _add(found.outer, [actual], inner.outer[formal])

    def _region(
        self, graph: Graph, op: Op, region: Region, sizes: dict[str, int], found: _Found
    ) -> None:
        """Of all layers of a `repeat`; experts are counted together already."""
        times = int(str(op.attrs["count"])) if op.kind == "repeat" else 1
        inner = self.visit(graph, region.ops, sizes)
        own = [
            self.kept(graph, arg, inner.outer.pop(arg), sizes, op)
            for arg in region.args
            if arg in inner.outer
        ]
        found.values += inner.values + sum(arg.type.bytes(sizes) for arg in region.args)
        found.kept += [replace(one, bytes=times * one.bytes) for one in (*inner.kept, *own)]
        for value, readers in inner.outer.items():
            _add(found.outer, [value], readers)

    def _is_repeated(self, graph: Graph, op: Op) -> bool:
        if op.kind in VIEWS or op.kind in REPEATED:
            return True
        if op.kind != "linear" or not any(o.kind == "attention" for o in graph.ops):
            return False
        # Up from a normed latent, such as that of the queries: to far more than is kept for it.
        (x,) = op.operands
        normed = any(o.kind == "rms_norm" and x in o.results for o in graph.ops)
        return normed and (op.result.type.last.size or 0) > (x.type.last.size or 0)

    def kept(
        self, graph: Graph, value: Value, readers: Readers, sizes: Sizes, op: Op | None
    ) -> Kept:
        """A value with the bytes of the format that its readers take it in."""
        count = value.type.count(sizes)
        size, per = self._format(value, readers)
        span = op.spans[0] if op and op.spans else graph.span
        return Kept(value.name, graph.name, -(-count * size // per), span)

    def _format(self, value: Value, readers: Readers) -> tuple[int, int]:
        """Bytes for a number of elements."""
        if self._fp8 and value.type.dtype == "bf16":
            routed = value.type.dims[0].name in ("slot", "token")
            if routed and readers <= {"grouped_linear", "linear", "silu", "mul"}:
                return FP8_BYTES
            if readers == {"attention", "linear"}:
                return E5M6_BYTES
        return BYTES[value.type.dtype], 1


def _add(needed: dict[Value, Readers], values: Iterable[Value], readers: Readers) -> None:
    for value in values:
        needed[value] = needed.get(value, frozenset()) | readers


def _bound(op: Op, callee: Graph, sizes: Sizes) -> dict[str, int]:
    """The run-time sizes inside a callee."""
    inner = dict(sizes)
    for formal, actual in zip(callee.args, op.operands, strict=True):
        for inside, outside in zip(formal.type.dims, actual.type.dims, strict=True):
            if inside.size is None:
                inner[inside.name] = max(0, outside.at(sizes))
    return inner
