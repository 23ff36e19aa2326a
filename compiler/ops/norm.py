"""Normalisation and pointwise functions."""

from __future__ import annotations

from typing import ClassVar

from compiler.graph.types import Type
from compiler.ops.base import Operator, Site, TypeMismatch, need_float, need_rank


class RMSNorm(Operator):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, cast at the end."""

    kind = "rms_norm"
    operands = ("x",)
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[0], site.weights[0]
        eps = site.attrs["eps"]
        assert isinstance(eps, float)
        if not eps > 0:
            raise TypeMismatch(f"rms_norm needs an eps above 0, got {eps:g}")
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        if weight.dims != (x.last,):
            raise TypeMismatch(f"rms_norm expects {weight.words}, got {x.last.words}", 0)
        return (x,)


class _Pointwise(Operator):
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return site.types


class SiLU(_Pointwise):
    """x * sigmoid(x)."""

    kind = "silu"


class Sigmoid(_Pointwise):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"


class Softmax(_Pointwise):
    """exp(x) / sum(exp(x)) over the last dimension, in float32."""

    kind = "softmax"
