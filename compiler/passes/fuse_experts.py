"""Experts as grouped products: tokens sorted by expert, one product for all, sorted back.

The `experts` region becomes permute, its equations on all slots at once with `grouped_linear` for
`linear`, and the weighted un-permute. No loop over experts, and no token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Attr, Op, Program, Value
from compiler.graph.types import Dim
from compiler.ops import OPS
from compiler.ops.base import dims_attr
from compiler.passes.base import Pass
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    return rewrite(program, "experts", _fuse)


FUSE_EXPERTS = Pass(
    "fuse_experts",
    "all experts in one grouped product for each linear",
    _run,
    ensures="no experts region whose equations have a grouped form",
)


def _fuse(at: Rewriter) -> Sequence[Value] | Miss:
    x, topk_indices, weight = at.op.operands
    (region,) = at.op.regions
    for inner in region.ops[:-1]:
        if not _has_grouped_form(inner):
            return Miss(f"{inner.kind} inside an expert has no grouped form", inner)
        outside = [v for v in inner.operands if v not in _made(region.args, region.ops)]
        if outside:
            return Miss(f"an expert reads {outside[0]} from outside", inner)
    count = dims_attr(Dim("n_routed_experts", at.op.number("count")))
    attrs: dict[str, Attr] = {**at.op.attrs, "count": count}
    names = ["rows", "offs", "sort_indices"]
    rows, offs, sort_indices = at.add("permute", [x, topk_indices], names=names, **attrs)
    inside: dict[Value, Value] = {region.args[0]: rows}
    for inner in region.ops[:-1]:
        _grouped(at, inner, inside, rows, offs)
    return at.add(
        "unpermute", [inside[region.yielded[0]], sort_indices, weight], names=[at.op.result.name]
    )


def _has_grouped_form(op: Op) -> bool:
    """A product, a bias, and what treats all rows alike."""
    if op.kind == "parameter":
        return len(op.result.type.dims) == 1
    return op.kind == "linear" or OPS[op.kind].rowwise


def _grouped(at: Rewriter, inner: Op, inside: dict[Value, Value], rows: Value, offs: Value) -> None:
    """The same equation on the slots of all experts."""
    operands = [inside[v] for v in inner.operands]
    kind = inner.kind
    if kind == "linear":
        kind, operands = "grouped_linear", [*operands, offs]
    if kind == "parameter":
        kind, operands = "grouped_parameter", [rows, offs]
    names = [v.name for v in inner.results]
    results = at.like(inner).add(kind, operands, inner.symbols, names=names, **inner.attrs)
    inside.update(zip(inner.results, results, strict=True))


def _made(args: Sequence[Value], ops: Sequence[Op]) -> set[Value]:
    return {*args, *(v for op in ops for v in op.results)}
