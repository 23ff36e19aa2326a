"""FP8 casts where the precision of weights asks for them: around the products with these weights.

Each product takes quantized operands and their scales. Then equal casts are made once, for all
their users, and casts move before the sorting by expert, so that tokens travel in FP8.
See docs/precision.md for which scales are powers of two, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Op, Program, Value, lists
from compiler.ops.base import dims_attr
from compiler.ops.quantize import parts_attr
from compiler.passes.base import Pass
from compiler.passes.simplify import share_equal
from compiler.rewrite import Miss, Place, rewrite
from dsl.load import Description

# What leaves numbers as they are, or works within each head.
LAYOUT = ("flatten", "unflatten", "split", "concat", "head_linear")
ATTENTION = ("attention", "latent_attention")


def _run(program: Program, description: Description) -> Sequence[Miss]:
    misses = rewrite(program, "linear", _product)
    misses += rewrite(program, "grouped_linear", _product)
    _share(program)
    rewrite(program, "permute", _permute_quantized)
    _share(program)
    return misses


PLACE_FP8 = Pass(
    "place_fp8",
    "products with weights in FP8, where the precision of the spec says so",
    _run,
    requires="experts fused, so that theirs are grouped products",
    ensures="each product of an FP8 weight takes quantized operands; equal casts are made once",
)


def _product(at: Place) -> Sequence[Value] | Miss:
    """y = x W^T: x in runs of a row, W in blocks."""
    op = at.op
    weights = [at.builder.graph.weights[name] for name in op.symbols]
    if not weights[0].fp8:
        return Miss("the precision of its weight is that of its input", op)
    x, *ends = op.operands
    scale = _scale_of(at, x, weights[0].fp8)
    x_names, w_names = (f"{x.name}_q", f"{x.name}_s"), _names(op)
    q, s = at.add("quantize", [x], names=x_names, scale=scale, parts=())
    wq, ws = at.add(
        "quantize_weight", [], op.symbols, names=w_names,
        scale="ue8m0" if weights[0].fp8 == "ue8m0" else "fp32",
        experts=dims_attr(*ends[0].type.dims) if ends else (),
    )  # fmt: skip
    return at.add(
        f"fp8_{op.kind}", [q, s, *ends, wq, ws], names=[op.result.name],
        dtype=op.result.type.dtype, parts=parts_attr([w.type.dims[0].size or 0 for w in weights]),
    )  # fmt: skip


def _names(op: Op) -> tuple[str, str]:
    """What a quantized weight is called: by its module."""
    name = op.symbols[0].removesuffix(".weight").rpartition(".")[2]
    return f"{name}_q", f"{name}_s"


def _scale_of(at: Place, x: Value, wanted: str) -> str:
    """Report, section 3.3.3: powers of two for what is tiled once more, and for what travels."""
    if wanted != "recipe":
        return wanted
    source = at.producers.get(x)
    while source is not None and source.kind in LAYOUT:
        source = at.producers.get(source.operands[0])
    return "ue8m0" if source and source.kind in (*ATTENTION, "permute") else "fp32"


def _share(program: Program) -> None:
    """Equal casts are made once, by the first of them."""
    for graph in program.graphs.values():
        share_equal(graph)


def _permute_quantized(at: Place) -> Sequence[Value] | Miss:
    """quantize(permute(x)) is permute(quantize(x)): each token is quantized once, not k times."""
    rows, ends, _ = at.op.results
    readers = [op for op in at.builder.graph.walk() if rows in op.operands]
    if [op.kind for op in readers] != ["quantize"]:
        return Miss("tokens are not only read in FP8", at.op)
    (quantize,) = readers
    x, route = at.op.operands
    names = (f"{x.name}_q", f"{x.name}_s")
    at.builder.names -= {v.name for v in quantize.results}
    scale = quantize.attrs["scale"]
    q, s = at.add("quantize", [x], names=names, like=quantize, scale=scale, parts=())
    rows_q, rows_s, *rest = at.add(
        "permute_quantized", [q, s, route],
        names=[v.name for v in (*quantize.results, *at.op.results[1:])],
        count=dims_attr(*ends.type.dims),
    )  # fmt: skip
    for old, new in zip(quantize.results, (rows_q, rows_s), strict=True):
        at.builder.graph.replace_uses(old, new)
    for ops in lists(at.builder.graph):
        if quantize in ops:
            ops.remove(quantize)
    return [rows_q, *rest]
