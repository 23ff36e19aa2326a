"""FP8 casts where the precision of weights asks for them: around the products with these weights.

All three products of a linear layer take quantized operands and their scales: the forward pass, the
gradient of its input and the gradient of its weight. Then equal casts are made once, for all their
users, and casts move: before the sorting by expert, so that tokens travel in FP8, and from the
backward graph to the forward graph, so that it is saved in FP8. See docs/precision.md for which
scales are powers of two, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Graph, Op, Program, Value, Weight
from compiler.ops import OPS
from compiler.ops.base import dims_attr, module_of
from compiler.ops.quantize import parts_attr
from compiler.passes.base import Pass
from compiler.passes.differentiate import save
from compiler.passes.simplify import common_subexpression_elimination
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if not any(w.fp8 for graph in program.graphs.values() for w in graph.weights.values()):
        return ()
    products = _Products(program)
    rules = {
        "linear": products.forward,
        "grouped_linear": products.forward,
        "linear_input_grad": products.input_grad,
        "grouped_linear_input_grad": products.input_grad,
        "linear_weight_grad": products.weight_grad,
        "grouped_linear_weight_grad": products.weight_grad,
    }
    misses = [miss for kind, rule in rules.items() for miss in rewrite(program, kind, rule)]
    _share(program)
    _save_quantized(program)
    rewrite(program, "permute", _permute_quantized)
    rewrite(program, "dispatch", _dispatch_quantized)
    rewrite(program, "dispatch_again", _dispatch_gradients_quantized)
    _share(program)
    return misses


PLACE_FP8 = Pass(
    "place_fp8",
    "products with weights in FP8, where the precision of the spec says so",
    _run,
    requires="experts fused, so that theirs are grouped products",
    ensures="each product of an FP8 weight takes quantized operands; equal casts are made once",
)


class _Products:
    """The rules for products; each gives what takes the place of one."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def forward(self, at: Rewriter) -> Sequence[Value] | Miss:
        """y = x W^T: x in runs of a row, W in blocks."""
        weights = _weights(at, at.op.symbols)
        if not weights[0].fp8:
            return _stays(at)
        x, *offs = at.op.operands
        scale = self.scale_of(at, x, weights[0])
        q, s = at.add("quantize", [x], names=_names(x), scale=scale, parts=())
        return _fp8(at, [q, s, *offs, *_fp8_weight(at, offs)], parts=_parts(weights))

    def input_grad(self, at: Rewriter) -> Sequence[Value] | Miss:
        """dx = dy W: dy in runs of a row, the weights as the forward product has them."""
        weights = _weights(at, at.op.symbols)
        if not weights[0].fp8:
            return _stays(at)
        dy, *offs = at.op.operands
        scale, parts = self.scale_of(at, dy, weights[0]), _parts(weights)
        q, s = at.add("quantize", [dy], names=_names(dy), scale=scale, parts=parts)
        return _fp8(at, [q, s, *offs, *_fp8_weight(at, offs)], parts=parts)

    def weight_grad(self, at: Rewriter) -> Sequence[Value] | Miss:
        """dW = dy^T x: both in runs of tokens; x from what the forward product was made of."""
        weights = [w for o in at.uses.get(at.op.result, [])[:1] for w in _weights(at, o.symbols)]
        if not weights or not weights[0].fp8:
            return _stays(at)
        dy, x, *offs = at.op.operands
        return _fp8(at, [*self.columns(at, dy, offs, weights, dispatched=_is_dispatched(at, dy)),
                         *self.columns(at, x, offs, weights, dispatched=True), *offs])  # fmt: skip

    def columns(
        self,
        at: Rewriter,
        x: Value,
        offs: Sequence[Value],
        weights: Sequence[Weight],
        *,
        dispatched: bool,
    ) -> list[Value]:
        """x in runs of tokens; from its runs of a row where these are all that there is of it."""
        scale = self.scale_of(at, x, weights[0])
        names = (f"{x.name}_columns_q", f"{x.name}_columns_s")
        if not dispatched:
            return at.add("quantize_columns", [x, *offs], names=names, scale=scale)
        q, s = at.add("quantize", [x], names=_names(x), scale=scale, parts=())
        return at.add("requantize", [q, s, *offs], names=names, scale=scale)

    def scale_of(self, at: Rewriter, x: Value, weight: Weight) -> str:
        """Powers of two for what is tiled again, and for what travels: report, section 3.3.3."""
        if weight.fp8 != "recipe":
            return weight.fp8
        source = _source(at.producers, x)
        if source is not None and source[0].kind == "saved":
            source = self.saved_source(at.builder.graph, *source)
        return "ue8m0" if source and OPS[source[0].kind].tiled_twice else "fp32"

    def saved_source(self, backward: Graph, saved: Op, value: Value) -> tuple[Op, Value] | None:
        """Where in the forward graph a value comes from that the backward graph reads."""
        forward = self.program.saver_of(backward.name)
        assert forward is not None
        x = forward.saved[saved.results.index(value)]
        return _source(forward.producers(), x)


def _weights(at: Rewriter, symbols: Sequence[str]) -> list[Weight]:
    return [at.builder.graph.weights[name] for name in symbols]


def _stays(at: Rewriter) -> Miss:
    return Miss("the precision of its weight is that of its input", at.op)


def _parts(weights: Sequence[Weight]) -> tuple[Attr, ...]:
    return parts_attr([w.type.dims[0].size or 0 for w in weights])


def _names(x: Value) -> tuple[str, str]:
    return f"{x.name}_q", f"{x.name}_s"


def _fp8_weight(at: Rewriter, offs: Sequence[Value]) -> list[Value]:
    """The FP8 copy of the weights of a product, named by their module."""
    symbols = at.op.symbols
    name = module_of(symbols[0])
    return at.add(
        "fp8_weight", [], symbols, names=(f"{name}_q", f"{name}_s"),
        scale=_weights(at, symbols)[0].fp8_scale,
        experts=dims_attr(*offs[0].type.dims) if offs else (),
    )  # fmt: skip


def _fp8(at: Rewriter, operands: Sequence[Value], **attrs: Attr) -> list[Value]:
    """The same product in FP8."""
    attrs["dtype"] = at.op.result.type.dtype
    names, kind = [at.op.result.name], f"fp8_{at.op.kind}"
    return at.add(kind, operands, names=names, **attrs)


def _source(producers: dict[Value, Op], x: Value) -> tuple[Op, Value] | None:
    """The operator that computed the numbers of x, however they lie, and its result."""
    op = producers.get(x)
    while op is not None and OPS[op.kind].keeps_numbers:
        x = op.operands[0]
        op = producers.get(x)
    return (op, x) if op is not None else None


def _is_dispatched(at: Rewriter, dy: Value) -> bool:
    """Whether a gradient came to the experts in FP8, in runs of a row."""
    source = _source(at.producers, dy)
    return source is not None and source[0].kind == "unpermute_grad"


# ---- casts that are shared, and that move ----------------------------------------------------


def _share(program: Program) -> None:
    """Equal casts are made once, by the first of them."""
    for graph in program.graphs.values():
        common_subexpression_elimination(graph)


def _save_quantized(program: Program) -> None:
    """What a backward graph only quantizes is quantized by its forward graph, and saved so."""
    for forward in program.graphs.values():
        backward = program.backward_of(forward.name)
        if backward is None:
            continue
        read, uses = backward.ops[0].results, backward.uses()
        for value in list(read):
            readers = uses.get(value, [])
            if [op.kind for op in readers] == ["quantize"]:
                at, (cast,) = read.index(value), readers
                before, x, after = forward.saved[:at], forward.saved[at], forward.saved[at + 1 :]
                save(forward, [*before, *_quantized(x, cast, forward, program), *after])
                read[at : at + 1] = cast.results
                backward.ops.remove(cast)


def _quantized(x: Value, cast: Op, graph: Graph, program: Program) -> Sequence[Value]:
    """x as `cast` quantizes it, in the forward graph, where it may be so already."""
    for op in graph.ops:
        if op.kind == cast.kind and op.operands == [x] and op.attrs == cast.attrs:
            return op.results
    builder = Builder(graph, program.graphs)
    builder.ops = []
    scale, parts = cast.attrs["scale"], cast.attrs["parts"]
    names = _names(x)
    made = builder.add("quantize", [x], names=names, spans=cast.spans, scale=scale, parts=parts)
    at = next(i for i, op in enumerate(graph.ops) if op.kind == "save")
    graph.ops[at:at] = builder.ops
    return made


def _permute_quantized(at: Rewriter) -> Sequence[Value] | Miss:
    """quantize(permute(x)) is permute(quantize(x)): each token is quantized once, not k times."""
    rows, offs, sort_indices = at.op.results
    cast = at.only_reader(rows, "quantize")
    if cast is None:
        return Miss("tokens are not only read in FP8", at.op)
    x, topk_indices = at.op.operands
    names = [v.name for v in (*cast.results, offs, sort_indices)]
    operands = [*_cast_of(at, x, cast), topk_indices]
    moved = at.add("permute_quantized", operands, names=names, **at.op.attrs)
    at.erase(cast, moved[:2])
    return [moved[0], *moved[2:]]


def _dispatch_quantized(at: Rewriter) -> Sequence[Value] | Miss:
    """Tokens travel to the ranks of their experts in FP8, with their scales as further rows."""
    *rows, topk_indices = at.op.operands
    casts = [at.only_reader(value, "quantize") for value in at.op.results[: len(rows)]]
    if not any(casts):
        return Miss("tokens are not only read in FP8", at.op)
    sent: list[Value] = []
    names: list[str] = []
    for row, result, cast in zip(rows, at.op.results, casts, strict=False):
        sent += _cast_of(at, row, cast) if cast else [row]
        names += [v.name for v in cast.results] if cast else [result.name]
    names += [v.name for v in at.op.results[len(rows) :]]
    moved = at.add("dispatch", [*sent, topk_indices], names=names, **at.op.attrs)
    results, left = [], list(moved)
    for cast in casts:
        results.append(left[0])
        if cast:
            at.erase(cast, left[:2])
        left = left[2 if cast else 1 :]
    return [*results, *left]


def _dispatch_gradients_quantized(at: Rewriter) -> Sequence[Value] | Miss:
    """Gradients travel to the experts in FP8, too: report, sections 3.2.3 and 3.3.3.

    Each expert's share of a gradient is cast once more, for its product: the weight of the expert
    is part of it.
    """
    *rows, handle = at.op.operands
    casts = [_cast_of_share(at, value) for value in at.op.results]
    if not any(casts):
        return Miss("gradients are not only read in FP8", at.op)
    sent: list[Value] = []
    names: list[str] = []
    for row, result, cast in zip(rows, at.op.results, casts, strict=True):
        if cast:
            scale = cast.attrs["scale"]
            sent += at.add("quantize", [row], names=_names(row), scale=scale, parts=())
            names += _names(result)
        else:
            sent.append(row)
            names.append(result.name)
    moved = at.add("dispatch_again", [*sent, handle], names=names, **at.op.attrs)
    found, left = [], iter(moved)
    for result, cast in zip(at.op.results, casts, strict=True):
        arrived = next(left)
        if cast:
            pair, dtype = [arrived, next(left)], result.type.dtype
            (arrived,) = at.add("dequantize", pair, names=[result.name], dtype=dtype)
        found.append(arrived)
    return found


def _cast_of_share(at: Rewriter, gradient: Value) -> Op | None:
    """The cast of the experts' shares of a gradient, where nothing else is made of them."""
    shares = at.only_reader(gradient, "unpermute_grad")
    return at.only_reader(shares.results[0], "quantize") if shares else None


def _cast_of(at: Rewriter, x: Value, cast: Op) -> list[Value]:
    """The cast on what its value is made of; its own names are free."""
    at.builder.names -= {v.name for v in cast.results}
    scale = cast.attrs["scale"]
    return at.like(cast).add("quantize", [x], names=_names(x), scale=scale, parts=())
