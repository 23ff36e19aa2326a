"""Elementwise functions of one tensor: a class each, listed in `POINTWISE`.

Everything else follows from the class: the function of the block language and the statement bear
its name, `F.kind` computes it, and `G.kind_grad` its derivative (`gradient.POINTWISE_GRADS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import Type
from compiler.ops.base import Adjoint, Operator, Site, need_float, only


class Pointwise(Operator):
    """An elementwise function. Subclasses say its derivative in words, `d` times the slope."""

    operands = ("x",)
    cheap = True
    rowwise = True
    derivative: ClassVar[str]
    # Whether the derivative reads the result, y, in place of x.
    by_result: ClassVar[bool] = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return site.types

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return by_grad_operator(at, op, d, op.result if cls.by_result else op.operands[0])


def by_grad_operator(
    at: Adjoint, op: Op, d: Sequence[Value | None], other: Value
) -> list[Value | None]:
    """By the operator `.._grad`, from the gradient and one value of the forward pass."""
    return [*at.add(f"{op.kind}_grad", [only(d), other], names=[f"d_{op.operands[0].name}"])]


class SiLU(Pointwise):
    """x * sigmoid(x)."""

    kind = "silu"
    derivative = "d * sigmoid(x) * (1 + x * (1 - sigmoid(x)))."


class Sigmoid(Pointwise):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"
    derivative = "d * y * (1 - y), where y is the sigmoid."
    by_result = True


class GELU(Pointwise):
    """x times the normal distribution function of x (arXiv 1606.08415), exact."""

    kind = "gelu"
    derivative = (
        "d * (P(x) + x * p(x)), where P is the normal distribution function, p its density."
    )


class GELUTanh(Pointwise):
    """gelu by tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""

    kind = "gelu_tanh"
    derivative = "d times the slope of gelu_tanh at x."


class ReLU(Pointwise):
    """x where it is above 0, else 0."""

    kind = "relu"
    derivative = "d where y is above 0, else 0."
    by_result = True


class ReLUSquared(Pointwise):
    """relu(x)^2 (arXiv 2109.08668)."""

    kind = "relu_squared"
    derivative = "2 * d * relu(x)."


class Tanh(Pointwise):
    """Hyperbolic tangent."""

    kind = "tanh"
    derivative = "d * (1 - y^2), where y is the tangent."
    by_result = True


class Softplus(Pointwise):
    """log(1 + exp(x))."""

    kind = "softplus"
    derivative = "d * sigmoid(x)."


class Exp(Pointwise):
    """e to the power of x."""

    kind = "exp"
    derivative = "d * y, where y is the power."
    by_result = True


class Log(Pointwise):
    """Natural logarithm."""

    kind = "log"
    derivative = "d / x, of a natural logarithm."


class Sqrt(Pointwise):
    """Square root."""

    kind = "sqrt"
    derivative = "d / (2 * y), where y is the root."
    by_result = True


POINTWISE: tuple[type[Pointwise], ...] = (
    SiLU, Sigmoid, GELU, GELUTanh, ReLU, ReLUSquared, Tanh, Softplus, Exp, Log, Sqrt,
)  # fmt: skip
