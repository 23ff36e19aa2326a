"""The modules of a program with their weights, arithmetic and memory.

Layers and experts are counted, never walked one by one: a block is looked at once for each length
of sequence that it sees, so that the cost grows with the number of distinct blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from compiler.analysis.work import Shares, Tally, Work, merged, scaled
from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, Value, sizes_inside
from compiler.graph.types import BYTES, Dim
from compiler.ops import OPS
from compiler.ops.moe import computing

Sizes = Mapping[str, int]

# Operators on the weights of all experts at once, outside of a region.
_OF_ALL_EXPERTS = ("grouped_linear", "grouped_parameter", "fp8_weight")


@dataclass(frozen=True)
class TensorCount:
    """`count` equal weights, of which one token meets `active`: experts that it is not sent to
    do not count. `name` is relative to the module; `{0..255}` stands for experts or layers."""

    name: str
    dims: tuple[Dim, ...]
    dtype: str
    work: Work
    trainable: bool
    count: int
    active: int
    fp8: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of them."""
        return tuple(d.size or 0 for d in self.dims)

    @property
    def parameters(self) -> int:
        """Elements of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def activated(self) -> int:
        return self.active * math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * BYTES[self.dtype]


@dataclass(frozen=True)
class Submodule:
    """`count` equal modules inside a module, such as `layers.{3..60}`; a token meets `active`.

    One pass through the module around makes `passes` through this one: more than `count` where
    weights are shared, one where all experts are counted together.
    """

    name: str
    module: Module
    count: int
    active: int
    passes: int


@dataclass(frozen=True)
class Module:
    """One block in use, with everything inside it.

    `elements` of all weights by share, those that are not trained included; `active_elements` are
    those that one token meets. `flops` are for one forward pass over the batch and length that the
    module was made for, `cache_bytes` for one token. Weights in FP8 have `fp8_elements`, and their
    products `fp8_flops`. `lines` is how many modules and tensors a listing of everything inside
    names.
    """

    block: str
    tensors: tuple[TensorCount, ...]
    parts: tuple[Submodule, ...]
    elements: Tally
    active_elements: Tally
    flops: Tally
    fp8_flops: int
    fp8_elements: int
    cache_bytes: int
    bytes: int
    tensor_count: int
    lines: int

    @property
    def parameters(self) -> int:
        return sum(self.elements.values())

    @property
    def activated(self) -> int:
        return sum(self.active_elements.values())


@dataclass(frozen=True)
class _Many:
    """What a `*` in a name stands for: layers, or experts of which a token meets `active`."""

    items: range
    active: int


@dataclass(frozen=True)
class _Context:
    """Where operators stand in their graph. `times` is how often they run in one pass."""

    sizes: Sizes
    around: Work | None
    many: tuple[_Many, ...] = ()
    times: int = 1
    experts: _Many | None = None


@dataclass
class _Content:
    """What was found in a module so far. Names are keys: a weight used twice counts once."""

    tensors: dict[str, TensorCount] = field(default_factory=dict)
    parts: dict[str, Submodule] = field(default_factory=dict)
    flops: dict[Work, int] = field(default_factory=dict)
    fp8_flops: int = 0
    cache_bytes: int = 0


class Modules:
    """Makes the modules of one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._shares = Shares(program)
        self._made: dict[tuple[object, ...], Module] = {}

    def root(self, ops: Iterable[Op], sizes: Sizes, without: Module | None = None) -> Module:
        """The outermost block, of which only `ops` are looked at.

        Weights that `without` has, too, are not counted again.
        """
        content = self._content(self._program.main, ops, _Context(sizes, None))
        if without is not None:
            for tensor in without.tensors:
                content.tensors.pop(tensor.name, None)
            for part in without.parts:
                content.parts.pop(part.name, None)
        return _closed(self._program.main, content)

    def _content(self, graph: Graph, ops: Iterable[Op], place: _Context) -> _Content:
        content = _Content()
        self._visit(graph, ops, place, content)
        return content

    def _visit(self, graph: Graph, ops: Iterable[Op], place: _Context, content: _Content) -> None:
        for op in ops:
            match op.kind:
                case "call":
                    self._call(graph, op, place, content)
                case "repeat":
                    self._visit(graph, op.regions[0].ops, _repeated(op, place), content)
                case "experts":
                    inner = self._in_experts(graph, op, place)
                    self._visit(graph, op.regions[0].ops, inner, content)
                case "cache_entry":
                    content.cache_bytes += place.times * sum(map(_token_bytes, op.operands))
                case "permute" | "permute_quantized":
                    place = self._permuted(graph, op, place)
                case _:
                    self._add(graph, op, place, content)

    def _permuted(self, graph: Graph, op: Op, place: _Context) -> _Context:
        """From here on `slot` is known, and weights of all experts are used at once."""
        site = site_of(op, graph, self._program.graphs)
        route, ends = op.operands[-1].type, op.results[-2].type
        experts = _Many(range(ends.last.size or 0), computing(op, route.last.size or 0))
        sizes = {**place.sizes, **OPS[op.kind].sizes(site, place.sizes)}
        return replace(place, sizes=sizes, experts=experts)

    def _in_experts(self, graph: Graph, op: Op, place: _Context) -> _Context:
        site = site_of(op, graph, self._program.graphs)
        chosen = computing(op, op.operands[1].type.last.size or 0)
        experts = _Many(range(site.number("count")), chosen)
        return replace(
            place,
            sizes=OPS[op.kind].inner_sizes(site, place.sizes),
            around=Work.ROUTED_EXPERTS,
            many=(*place.many, experts),
        )

    def _add(self, graph: Graph, op: Op, place: _Context, content: _Content) -> None:
        """The weights and the arithmetic of an operator that holds no others."""
        site = site_of(op, graph, self._program.graphs)
        flops = place.times * max(0, OPS[op.kind].flops(site, place.sizes))
        if not flops and not op.symbols:
            return
        work = self._shares.of(op, graph, place.around)
        content.flops[work] = content.flops.get(work, 0) + flops
        if any(graph.weights[symbol].fp8 for symbol in op.symbols):
            content.fp8_flops += flops
        for symbol in op.symbols:
            weight = graph.weights[symbol]
            grouped = place.experts if op.kind in _OF_ALL_EXPERTS else None
            many = (*place.many, grouped) if grouped else place.many
            name, count, active = _expanded(symbol, many)
            tensor = TensorCount(
                name,
                weight.type.dims,
                weight.type.dtype,
                work,
                weight.trainable,
                count,
                active,
                bool(weight.fp8),
            )
            known = content.tensors.get(name)
            # A table that is also the head is one that every token is multiplied with.
            if known is None or known.work is Work.EMBEDDING:
                content.tensors[name] = tensor

    def _call(self, graph: Graph, op: Op, place: _Context, content: _Content) -> None:
        callee = self._program.graphs[op.callee]
        sizes = sizes_inside(callee, op, place.sizes)
        around = self._shares.around_callees(graph, place.around)
        key = (callee.name, tuple(sorted(sizes.items())), around)
        if key not in self._made:
            inside = self._content(callee, callee.ops, _Context(sizes, around))
            self._made[key] = _closed(callee, inside)
        module = self._made[key]
        name, count, active = _expanded(op.text("scope"), place.many)
        content.flops = merged(content.flops, scaled(module.flops, place.times))
        content.fp8_flops += place.times * module.fp8_flops
        content.cache_bytes += place.times * module.cache_bytes
        before = content.parts[name].passes if name in content.parts else 0
        content.parts[name] = Submodule(name, module, count, active, before + place.times)


def _repeated(op: Op, place: _Context) -> _Context:
    count = op.number("count")
    return replace(place, many=(*place.many, _Many(op.layers, count)), times=place.times * count)


def _expanded(name: str, many: tuple[_Many, ...]) -> tuple[str, int, int]:
    """A name with its `*` written out, and how many it names: all, and those a token meets.

    The last `*` belongs to the innermost repeat or experts.
    """
    pieces = name.split("*")
    stars = many[len(many) - len(pieces) + 1 :]
    count = active = 1
    text = pieces[0]
    for star, piece in zip(stars, pieces[1:], strict=True):
        first, last = star.items[0], star.items[-1]
        text += (str(first) if first == last else f"{{{first}..{last}}}") + piece
        count *= len(star.items)
        active *= star.active
    return text, count, active


def _token_bytes(value: Value) -> int:
    """Bytes of one token's entry [batch, seq, ..] in a cache."""
    entry = value.type.dims[2:]
    return math.prod(d.size or 1 for d in entry) * BYTES[value.type.dtype]


def _closed(graph: Graph, content: _Content) -> Module:
    tensors, parts = tuple(content.tensors.values()), tuple(content.parts.values())
    elements: dict[Work, int] = {}
    active: dict[Work, int] = {}
    for tensor in tensors:
        elements[tensor.work] = elements.get(tensor.work, 0) + tensor.parameters
        active[tensor.work] = active.get(tensor.work, 0) + tensor.activated
    for part in parts:
        elements = merged(elements, scaled(part.module.elements, part.count))
        active = merged(active, scaled(part.module.active_elements, part.active))
    return Module(
        block=graph.name,
        tensors=tensors,
        parts=parts,
        elements=elements,
        active_elements=active,
        flops=merged({}, content.flops),
        fp8_flops=content.fp8_flops,
        fp8_elements=sum(t.parameters for t in tensors if t.fp8)
        + sum(p.count * p.module.fp8_elements for p in parts),
        cache_bytes=content.cache_bytes,
        bytes=sum(t.bytes for t in tensors) + sum(p.count * p.module.bytes for p in parts),
        tensor_count=sum(t.count for t in tensors)
        + sum(p.count * p.module.tensor_count for p in parts),
        lines=1 + len(tensors) + sum(p.module.lines for p in parts),
    )
