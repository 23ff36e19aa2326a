"""Arithmetic and layout."""

from __future__ import annotations

from math import prod
from typing import ClassVar

from compiler.graph.types import Dim, Type
from compiler.ops.base import (
    Operator,
    Site,
    TypeMismatch,
    dims_of,
    find_dim,
    need_float,
    need_rank,
    same_shape,
)


class _Elementwise(Operator):
    operands = ("x", "y")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, y = site.types
        need_float(cls.kind, x)
        # A scalar meets every shape.
        if not y.dims and x.dims:
            return (x,)
        if not x.dims and y.dims:
            return (y,)
        same_shape(cls.kind, x, y)
        return (x,)


class Add(_Elementwise):
    """x + y of equal shapes; a scalar meets every shape."""

    kind = "add"
    sums = "all"


class Sub(_Elementwise):
    """x - y of equal shapes."""

    kind = "sub"
    sums = "all"


class Mul(_Elementwise):
    """x * y of equal shapes; a scalar meets every shape."""

    kind = "mul"
    sums = "one"


class Div(_Elementwise):
    """x / y of equal shapes; a scalar meets every shape."""

    kind = "div"
    sums = "first"


class Scale(Operator):
    """x times a number that is known when the model is built."""

    kind = "scale"
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"by": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return site.types


class Cast(Operator):
    """x in another element type; `bf16` stands for the model's own."""

    kind = "cast"
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dtype": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[0].with_dtype(str(site.attrs["dtype"])),)


class Constant(Operator):
    """A scalar."""

    kind = "constant"
    attrs: ClassVar = {"value": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (Type("f32"),)


class Sum(Operator):
    """The sum of all elements."""

    kind = "sum"
    operands = ("x",)
    sums = "all"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return (Type(site.types[0].dtype),)


class Split(Operator):
    """The last dimension cut into parts, in order."""

    kind = "split"
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


class Concat(Operator):
    """Two tensors joined along the last dimension."""

    kind = "concat"
    operands = ("x", "y")
    sums = "all"
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, y = site.types
        need_rank(cls.kind, x, 1)
        need_rank(cls.kind, y, 1, 1)
        same_shape(cls.kind, Type(x.dtype, x.dims[:-1]), Type(y.dtype, y.dims[:-1]))
        (into,) = dims_of(site.attrs["into"])
        if (x.last.size or 0) + (y.last.size or 0) != into.size:
            total = (x.last.size or 0) + (y.last.size or 0)
            raise TypeMismatch(
                f"concat of {x.last.words} and {y.last.words} is {total}, not {into.words}", 1
            )
        return (x.with_last(into),)


class Flatten(Operator):
    """The last dimensions made one, `heads, head_dim` to `heads*head_dim`."""

    kind = "flatten"
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


class Unflatten(Operator):
    """The last dimension made several, `heads*head_dim` to `heads, head_dim`."""

    kind = "unflatten"
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


class Broadcast(Operator):
    """A new dimension before the last one, with equal entries: one head's keys for all heads."""

    kind = "broadcast"
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dim": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_rank(cls.kind, x, 1)
        return (x.with_last(*dims_of(site.attrs["dim"]), x.last),)


class _Drop(Operator):
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dim": str, "count": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        if site.number("count") < 1:
            raise TypeMismatch(f"{cls.kind} drops at least 1 entry, not {site.number('count')}")
        at = find_dim(cls.kind, x, str(site.attrs["dim"]))
        dim = x.dims[at]
        if dim.size is not None:
            raise TypeMismatch(f"{cls.kind} works on run-time dimensions, not on {dim.words}", 0)
        shorter = Dim(dim.name, None, dim.offset + site.number("count"))
        return (x.with_dims(*x.dims[:at], shorter, *x.dims[at + 1 :]),)


class DropFirst(_Drop):
    """x without its first `count` entries along a run-time dimension: tokens that come later."""

    kind = "drop_first"


class DropLast(_Drop):
    """x without its last `count` entries along a run-time dimension."""

    kind = "drop_last"


class LastEntry(Operator):
    """The last entry along `seq`: the only position whose next token a decoder asks for."""

    kind = "last_entry"
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        at = find_dim(cls.kind, x, "seq")
        return (x.with_dims(*x.dims[:at], *x.dims[at + 1 :]),)

    sums = "all"
