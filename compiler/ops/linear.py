"""What reads weights: products with them, and each as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import Dim, Type
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    Sums,
    TypeMismatch,
    dims_attr,
    dims_of,
    grad_name,
    need_float,
    need_rank,
    only,
)


class Embedding(Operator):
    """Row `token` of the table. Weight [vocab_size, hidden_size]."""

    kind = "embedding"
    operands = ("tokens",)
    symbols = ("weight",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        tokens, weight = site.types[0], site.weights[0]
        if tokens.dtype not in ("i32", "i64"):
            raise TypeMismatch(f"embedding needs token numbers, got {tokens.dtype}", 0)
        return (Type(weight.dtype, (*tokens.dims, weight.last)),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        if at.trainable(op.symbols):
            rows = dims_attr(at.weight(op.symbols[0]).dims[0])
            table = at.add(
                "embedding_grad", [only(d), op.operands[0]], names=["d_table"], rows=rows
            )
            at.add("accumulate_grad", table, op.symbols)
        return [None]


class Parameter(Operator):
    """A weight as a tensor: a bias that is added, a scale that is multiplied by."""

    kind = "parameter"
    view = True
    symbols = ("weight",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return site.weights

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        at.add("accumulate_grad", [only(d)], op.symbols)
        return []


class Linear(Operator):
    """y = x W^T, without a bias. Weight [out, in]; it is used in the element type of x.

    The results of several weights with the same input stand side by side in the last dimension.
    """

    kind = "linear"
    product = True
    operands: ClassVar[tuple[str, ...]] = ("x",)
    sums: ClassVar[Sums] = "all"
    symbols = ("weight*",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x = site.types[0]
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        return (x.with_last(out_dim(cls.kind, x, site.weights)),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * sum(w.dims[0].size or 0 for w in site.weights)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        x, *offs = op.operands
        dy, dx = only(d), None
        if at.needs_grad(x):
            names = [f"d_{x.name}"]
            (dx,) = at.add(f"{cls.kind}_input_grad", [dy, *offs], op.symbols, names=names)
        if at.trainable(op.symbols):
            names = [grad_name(op.symbols)]
            dw = at.add(f"{cls.kind}_weight_grad", [dy, x, *offs], names=names)
            at.add("accumulate_grad", dw, op.symbols)
        return [dx, *(None for _ in offs)]


def out_dim(kind: str, x: Type, weights: Sequence[Type]) -> Dim:
    """The dimension that weights [out, in] make of the last one of x, their rows added up."""
    for weight in weights:
        if weight.last != x.last:
            raise TypeMismatch(f"{kind} expects {weight.last.words}, got {x.last.words}", 0)
        if weight.dtype != weights[0].dtype:
            raise TypeMismatch(f"{kind} of weights in {weights[0].dtype} and {weight.dtype}", 1)
    rows = [weight.dims[0] for weight in weights]
    return Dim("+".join(d.name for d in rows), sum(d.size or 0 for d in rows))


class HeadLinear(Operator):
    """Each head's own rows of a weight: y_h = W_h x_h, or y_h = W_h^T x_h where `transposed`.

    x [.., heads, d]; weight [heads * n, in], whose rows start .. start + rows of each n are meant.
    """

    kind = "head_linear"
    keeps_numbers = True
    operands = ("x",)
    sums = "all"
    symbols = ("weight",)
    attrs: ClassVar = {"start": int, "rows": tuple, "transposed": bool}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[0], site.weights[0]
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 2)
        (rows,) = dims_of(site.attrs["rows"])
        heads = x.dims[-2].size or 0
        out = weight.dims[0].size or 0
        if not heads or out % heads or site.number("start") + (rows.size or 0) > out // heads:
            raise TypeMismatch(
                f"{weight.words} has no rows {rows.words} for each head of {x.words}"
            )
        given, made = (rows, weight.last) if site.attrs["transposed"] else (weight.last, rows)
        if x.last.size != given.size:
            raise TypeMismatch(f"head_linear expects {given.words}, got {x.last.words}", 0)
        return (x.with_last(made),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        (rows,) = dims_of(site.attrs["rows"])
        x, inside = site.types[0], site.weights[0].last.size or 0
        return 2 * x.count(sizes) // (x.last.size or 1) * (rows.size or 0) * inside
