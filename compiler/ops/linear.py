"""Products with weights."""

from __future__ import annotations

from collections.abc import Mapping

from compiler.graph.types import Type
from compiler.ops.base import Operator, Site, TypeMismatch, need_float, need_rank


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


class Linear(Operator):
    """y = x W^T, without a bias. Weight [out, in]; it is used in the element type of x."""

    kind = "linear"
    operands = ("x",)
    symbols = ("weight",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[0], site.weights[0]
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        if weight.last != x.last:
            raise TypeMismatch(f"linear expects {weight.last.words}, got {x.last.words}", 0)
        return (x.with_last(weight.dims[0]),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * (site.weights[0].dims[0].size or 0)
