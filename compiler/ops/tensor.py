"""Casts, constants, sums, and layout."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import FLOATS, Dim, Type
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    TypeMismatch,
    dims_attr,
    dims_of,
    find_dim,
    need_float,
    need_rank,
    only,
    same_shape,
)


class Cast(Operator):
    """x in another element type; `bf16` means the model's own."""

    kind = "cast"
    cheap = True
    rowwise = True
    termwise = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dtype": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[0].with_dtype(site.text("dtype")),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        if x.type.dtype not in FLOATS:
            return [None]
        return at.add("cast", [only(d)], names=[f"d_{x.name}"], dtype=x.type.dtype)


class Detach(Operator):
    """x, which no gradient reaches from here."""

    kind = "detach"
    view = True
    rowwise = True
    differentiable = False
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[0],)


class Constant(Operator):
    """A scalar."""

    kind = "constant"
    attrs: ClassVar = {"value": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (Type("f32"),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return []


class Sum(Operator):
    """The sum of all elements."""

    kind = "sum"
    termwise = True
    operands = ("x",)
    sums = "all"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return (Type(site.types[0].dtype),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        return at.add("expand_like", [only(d), x], names=[f"d_{x.name}"])


class Split(Operator):
    """The last dimension cut into parts, in order."""

    kind = "split"
    view = True
    rowwise = True
    keeps_numbers = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_rank(cls.kind, x, 1)
        parts = dims_of(site.attrs["into"])
        total = sum(d.size or 0 for d in parts)
        if x.last.size != total:
            words = " + ".join(d.words for d in parts)
            raise TypeMismatch(f"split of {x.last.words} into {words}, which is {total}", 0)
        return tuple(x.with_last(d) for d in parts)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        parts = [
            part or at.add("zeros_like", [result], names=[f"d_{result.name}"])[0]
            for part, result in zip(d, op.results, strict=True)
        ]
        return at.add("concat", parts, names=[f"d_{x.name}"], into=dims_attr(x.type.last))


class Concat(Operator):
    """Tensors joined along the last dimension."""

    kind = "concat"
    cheap = True
    keeps_numbers = True
    variadic = True
    sums = "all"
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        first, *others = site.types
        for i, x in enumerate(site.types):
            need_rank(cls.kind, x, 1, i)
        for x in others:
            same_shape(cls.kind, Type(first.dtype, first.dims[:-1]), Type(x.dtype, x.dims[:-1]))
        (into,) = dims_of(site.attrs["into"])
        total = sum(x.last.size or 0 for x in site.types)
        if total != into.size:
            words = " and ".join(x.last.words for x in site.types)
            raise TypeMismatch(f"concat of {words} is {total}, not {into.words}", 1)
        return (first.with_last(into),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        into = dims_attr(*(v.type.last for v in op.operands))
        return at.add("split", [only(d)], names=[f"d_{v.name}" for v in op.operands], into=into)


class Flatten(Operator):
    """The last dimensions made one, `heads, head_dim` to `heads*head_dim`."""

    kind = "flatten"
    view = True
    keeps_numbers = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dims": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        dims = dims_of(site.attrs["dims"])
        have = x.dims[-len(dims) :]
        if have != dims:
            want = ", ".join(d.words for d in dims)
            raise TypeMismatch(f"flatten expects {want} last, got {x.words}", 0)
        merged = Dim("*".join(d.name for d in dims), prod(d.size or 0 for d in dims))
        return (x.with_dims(*x.dims[: -len(dims)], merged),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        names = [f"d_{op.operands[0].name}"]
        return at.add("unflatten", [only(d)], names=names, dims=op.attrs["dims"])


class Unflatten(Operator):
    """The last dimension made several, `heads*head_dim` to `heads, head_dim`."""

    kind = "unflatten"
    view = True
    keeps_numbers = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dims": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_rank(cls.kind, x, 1)
        dims = dims_of(site.attrs["dims"])
        size = prod(d.size or 0 for d in dims)
        if x.last.size != size:
            words = " * ".join(d.words for d in dims)
            raise TypeMismatch(f"unflatten of {x.last.words} into {words}, which is {size}", 0)
        return (x.with_last(*dims),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        names = [f"d_{x.name}"]
        (dx,) = at.add("flatten", [only(d)], names=names, dims=op.attrs["dims"])
        if dx.type != x.type:
            (dx,) = at.add("rename", [dx], names=names, dim=dims_attr(x.type.last))
        return [dx]


class Broadcast(Operator):
    """A new dimension before the last one, with equal entries: one head's keys for all heads."""

    kind = "broadcast"
    view = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dim": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_rank(cls.kind, x, 1)
        return (x.with_last(*dims_of(site.attrs["dim"]), x.last),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        names = [f"d_{op.operands[0].name}"]
        return at.add("sum_over", [only(d)], names=names, dim=op.attrs["dim"])


class _Drop(Operator):
    view = True
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dim": str, "count": int}
    gradient: ClassVar[str]

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        if site.number("count") < 1:
            raise TypeMismatch(f"{cls.kind} drops at least 1 entry, not {site.number('count')}")
        at = find_dim(cls.kind, x, site.text("dim"))
        dim = x.dims[at]
        if dim.size is not None:
            raise TypeMismatch(f"{cls.kind} works on run-time dimensions, not on {dim.words}", 0)
        shorter = Dim(dim.name, None, dim.offset + site.number("count"))
        return (x.with_dims(*x.dims[:at], shorter, *x.dims[at + 1 :]),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        dim, count = op.attrs["dim"], op.attrs["count"]
        names = [f"d_{op.operands[0].name}"]
        return at.add(cls.gradient, [only(d)], names=names, dim=dim, count=count)


class DropFirst(_Drop):
    """x without its first `count` entries along a run-time dimension: tokens that come later."""

    kind = "drop_first"
    gradient = "pad_first"


class DropLast(_Drop):
    """x without its last `count` entries along a run-time dimension."""

    kind = "drop_last"
    gradient = "pad_last"


class LastEntry(Operator):
    """The last entry along `seq`: the only position whose next token a decoder asks for."""

    kind = "last_entry"
    view = True
    sums = "all"
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        at = find_dim(cls.kind, x, "seq")
        return (x.with_dims(*x.dims[:at], *x.dims[at + 1 :]),)
