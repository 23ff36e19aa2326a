"""Arithmetic by elements: of two tensors, whose shapes are broadcast, and of a tensor and a number.

Shapes meet as in NumPy: dimensions are compared from the last one on, by name and size; one of size
1, or one that is missing, is repeated. What was repeated is summed in the gradient (`sum_to`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import ClassVar

from compiler.graph.core import Attr, Op, Value
from compiler.graph.types import Dim, Type
from compiler.ops.base import Adjoint, Operator, Site, TypeMismatch, need_dtype, need_float, only


class _Elementwise(Operator):
    operands = ("x", "y")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, y = site.types
        need_float(cls.kind, x)
        # A scalar meets every shape, and every element type.
        if not y.dims and x.dims:
            return (x,)
        if not x.dims and y.dims:
            return (y,)
        dims = _broadcast(cls.kind, x, y)
        need_dtype(cls.kind, x, y)
        return (x.with_dims(*dims),)


def _broadcast(kind: str, x: Type, y: Type) -> tuple[Dim, ...]:
    """The dimensions that both have in the end. Raises `TypeMismatch` that names two of them."""
    longer, shorter = (x, y) if len(x.dims) >= len(y.dims) else (y, x)
    leading = len(longer.dims) - len(shorter.dims)
    dims = list(longer.dims[:leading])
    for a, b in zip(x.dims[len(x.dims) - len(shorter.dims) :],
                    y.dims[len(y.dims) - len(shorter.dims) :], strict=True):  # fmt: skip
        if a == b or (_repeats(b) and a.name != "1"):
            dims.append(a)
        elif _repeats(a):
            dims.append(b)
        else:
            raise TypeMismatch(
                f"{kind} needs shapes that meet: {a.words} does not meet {b.words}",
                1,
                "from the last one on, dimensions must be equal, by name and size; one of size 1, "
                "or one that is missing, is broadcast",
            )
    return tuple(dims)


def _repeats(dim: Dim) -> bool:
    return dim.size == 1 and not dim.axes


class Add(_Elementwise):
    """x + y; dimensions of size 1, and those that one of them lacks, are broadcast."""

    kind = "add"
    cheap = True
    rowwise = True
    termwise = True
    sums = "all"

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return [_fit(at, d[0], v) for v in op.operands]

    @classmethod
    def unchanged(cls, op: Op, zeros: Set[Value]) -> Value | None:
        for value, other in (op.operands, reversed(op.operands)):
            if other in zeros and value.type == op.result.type:
                return value
        return None


class Sub(_Elementwise):
    """x - y; dimensions of size 1, and those that one of them lacks, are broadcast."""

    kind = "sub"
    cheap = True
    rowwise = True
    sums = "all"

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        x, y = op.operands
        return [_fit(at, d[0], x), _fit(at, _negative(at, d[0], y), y)]


class Mul(_Elementwise):
    """x * y; dimensions of size 1, and those that one of them lacks, are broadcast."""

    kind = "mul"
    cheap = True
    rowwise = True
    termwise = True
    sums = "one"

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        x, y = op.operands
        return [_fit(at, _times(at, d[0], y, x), x), _fit(at, _times(at, d[0], x, y), y)]

    @classmethod
    def unchanged(cls, op: Op, zeros: Set[Value]) -> Value | None:
        """0, of two numbers."""
        if any(value.type.dims for value in op.operands):
            return None
        return next((value for value in op.operands if value in zeros), None)


class Div(_Elementwise):
    """x / y; dimensions of size 1, and those that one of them lacks, are broadcast."""

    kind = "div"
    cheap = True
    rowwise = True
    termwise = True
    sums = "first"

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """d / y, and -d (x / y) / y."""
        x, y = op.operands
        dx, dy = _over(at, d[0], y, x), _over(at, _times(at, d[0], op.result, y), y, y)
        return [_fit(at, dx, x), _fit(at, _negative(at, dy, y), y)]


class _WithNumber(Operator):
    operands = ("x",)
    cheap = True
    rowwise = True

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return site.types


class Scale(_WithNumber):
    """x times a number that is known when the model is built."""

    kind = "scale"
    termwise = True
    sums = "all"
    attrs: ClassVar = {"by": float}

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return at.add("scale", [only(d)], names=[f"d_{op.operands[0].name}"], by=op.attrs["by"])

    @classmethod
    def unchanged(cls, op: Op, zeros: Set[Value]) -> Value | None:
        return op.operands[0] if op.attrs["by"] == 1 else None


class Shift(_WithNumber):
    """x + by, or by - x where `negated`; by is known when the model is built."""

    kind = "shift"
    attrs: ClassVar = {"by": float, "negated": bool}

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return [_negative(at, d[0], op.operands[0]) if op.attrs["negated"] else d[0]]

    @classmethod
    def unchanged(cls, op: Op, zeros: Set[Value]) -> Value | None:
        return op.operands[0] if op.attrs["by"] == 0 and not op.attrs["negated"] else None


class Reciprocal(_WithNumber):
    """by / x, where by is a number that is known when the model is built."""

    kind = "reciprocal"
    attrs: ClassVar = {"by": float}

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """-d (by / x) / x."""
        (x,) = op.operands
        return [_negative(at, _over(at, _times(at, d[0], op.result, x), x, x), x)]


def _fit(at: Adjoint, d: Value | None, x: Value) -> Value | None:
    """A gradient in the type of its operand: what was broadcast takes the sum."""
    if d is None or not at.needs_grad(x):
        return None
    if d.type.dims != x.type.dims:
        d = _summed(at, d, x)
    if d.type.dtype != x.type.dtype:
        (d,) = at.add("cast", [d], names=[f"d_{x.name}"], dtype=x.type.dtype)
    return d


def _summed(at: Adjoint, d: Value, x: Value) -> Value:
    """d summed to the dimensions of x."""
    names = [f"d_{x.name}"]
    if not x.type.dims:
        return at.add("sum", [d], names=names)[0]
    leading = len(d.type.dims) - len(x.type.dims)
    ones: list[Attr] = []
    for i, (whole, own) in enumerate(zip(d.type.dims[leading:], x.type.dims, strict=True)):
        if whole != own:
            ones += [i - len(x.type.dims), own.name]
    return at.add("sum_to", [d], names=names, leading=leading, ones=tuple(ones))[0]


def _times(at: Adjoint, d: Value | None, by: Value, x: Value) -> Value | None:
    if d is None or not at.needs_grad(x):
        return None
    return at.add("mul", [d, by], names=[f"d_{x.name}"])[0]


def _over(at: Adjoint, d: Value | None, by: Value, x: Value) -> Value | None:
    if d is None or not at.needs_grad(x):
        return None
    return at.add("div", [d, by], names=[f"d_{x.name}"])[0]


def _negative(at: Adjoint, d: Value | None, x: Value) -> Value | None:
    if d is None or not at.needs_grad(x):
        return None
    return at.add("scale", [d], names=[f"d_{x.name}"], by=-1.0)[0]
