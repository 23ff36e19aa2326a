"""Normalization, and what is fused with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import Type
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    TypeMismatch,
    grad_name,
    need_float,
    need_rank,
    only,
    same_shape,
)
from compiler.ops.pointwise import by_grad_operator


class _Norm(Operator):
    cheap = True
    operands = ("x",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x = site.types[0]
        if not site.real("eps") > 0:
            raise TypeMismatch(f"{cls.kind} needs an eps above 0, got {site.real('eps'):g}")
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        for weight in site.weights:
            if weight.dims != (x.last,):
                raise TypeMismatch(f"{cls.kind} expects {weight.words}, got {x.last.words}", 0)
        return (x,)


class RMSNorm(_Norm):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, cast at the end."""

    kind = "rms_norm"
    symbols = ("weight",)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        dx, dw = at.add(
            "rms_norm_grad", [only(d), x], op.symbols,
            names=[f"d_{x.name}", grad_name(op.symbols)], eps=op.attrs["eps"],
        )  # fmt: skip
        if at.trainable(op.symbols):
            at.add("accumulate_grad", [dw], op.symbols)
        return [dx]


class LayerNorm(_Norm):
    """weight * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last dimension, in float32.

    It is cast at the end. The bias may be left out (arXiv 1607.06450).
    """

    kind = "layer_norm"
    symbols = ("weight", "bias?")

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        weight, *bias = op.symbols
        dw = grad_name(op.symbols)
        dx, *found = at.add(
            "layer_norm_grad", [only(d), x], [weight],
            names=[f"d_{x.name}", dw, f"{dw}_bias"], eps=op.attrs["eps"],
        )  # fmt: skip
        for symbol, gradient in zip([weight, *bias], found, strict=False):
            if at.trainable([symbol]):
                at.add("accumulate_grad", [gradient], [symbol])
        return [dx]


class AddRMSNorm(Operator):
    """x + y, and `rms_norm` of it: the residual is added and normed for the next block."""

    kind = "add_rms_norm"
    cheap = True
    operands = ("x", "y")
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, y = site.types
        same_shape(cls.kind, x, y)
        return (x, *RMSNorm.infer(replace(site, types=(x,))))

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        d_total, d_normed = d
        total = op.results[0]
        if d_normed is None:
            return [d_total, d_total]
        kind = "rms_norm_grad" if d_total is None else "add_rms_norm_grad"
        dx, dw = at.add(
            kind, [*([] if d_total is None else [d_total]), d_normed, total], op.symbols,
            names=[f"d_{total.name}", grad_name(op.symbols)], eps=op.attrs["eps"],
        )  # fmt: skip
        if at.trainable(op.symbols):
            at.add("accumulate_grad", [dw], op.symbols)
        return [dx, dx]


class SwiGLU(Operator):
    """silu(gate) * up (arXiv 2002.05202)."""

    kind = "swiglu"
    cheap = True
    rowwise = True
    operands = ("gate", "up")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        gate, up = site.types
        need_float(cls.kind, gate)
        same_shape(cls.kind, gate, up)
        return (gate,)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        names = [f"d_{v.name}" for v in op.operands]
        return at.add("swiglu_grad", [only(d), *op.operands], names=names)


class Softmax(Operator):
    """exp(x) / sum(exp(x)) over the last dimension, in float32."""

    kind = "softmax"
    cheap = True
    rowwise = True
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return site.types

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        return by_grad_operator(at, op, d, op.result)
