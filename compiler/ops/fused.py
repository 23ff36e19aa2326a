"""Neighbours as one operator, so that tensors between them are neither written nor read.

Each computes what its parts compute one after the other, to the bit; `runtime/` says so. They are
made after the gradients, so that they need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from compiler.graph.types import Dim, Type
from compiler.ops.attention import Rotate
from compiler.ops.base import Operator, Site, TypeMismatch, dims_of, need_rank
from compiler.ops.norm import RMSNorm, SwiGLU
from compiler.ops.quantize import RUN, Quantize, QuantizeColumns
from compiler.ops.tensor import Concat


class RotateLast(Operator):
    """`rotate` of the last elements of each head; those before them stay.

    x [batch, seq, heads, d], a table for at most d elements. `into` is the last dimension then.
    """

    kind = "rotate_last"
    operands = ("x", "cos", "sin")
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, cos, sin = site.types
        (into,) = dims_of(site.attrs["into"])
        turned = 2 * (cos.last.size or 0)
        if turned > (x.last.size or 0) or into.size != x.last.size:
            raise TypeMismatch(f"rotate_last of {x.last.words} by a table for {turned} numbers", 0)
        Rotate.infer(replace(site, types=(x.with_last(Dim("turned", turned)), cos, sin)))
        return (x.with_last(into),)


class JoinRotated(Operator):
    """Each head's own part, followed by `rotate` of a part that all heads share: keys, eq. 4.

    x [batch, seq, heads, d], shared [batch, seq, r] -> [batch, seq, heads, d + r].
    """

    kind = "join_rotated"
    operands = ("x", "shared", "cos", "sin")
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, shared, cos, sin = site.types
        need_rank(cls.kind, x, 3)
        (turned,) = Rotate.infer(replace(site, types=(shared, cos, sin)))
        for_heads = turned.with_last(x.dims[-2], turned.last)
        return Concat.infer(replace(site, types=(x, for_heads)))


class JoinRotatedGrad(Operator):
    """From gradients of keys and values: of both own parts of each head, concatenated, and of
    the shared part, turned back and summed over heads.

    d [batch, seq, heads, k + r], d_v [batch, seq, heads, v], the table of the forward pass ->
    [batch, seq, heads, k + v], [batch, seq, r]. `into` is k + v, `shared` is r.
    """

    kind = "join_rotated_grad"
    operands = ("d", "d_v", "cos", "sin")
    attrs: ClassVar = {"into": tuple, "shared": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d, d_v, cos, sin = site.types
        need_rank(cls.kind, d, 3)
        (shared,) = dims_of(site.attrs["shared"])
        one = Type(d.dtype, (*d.dims[:-2], shared))
        own = (d.last.size or 0) - (shared.size or 0)
        pair = d.with_last(Dim("own", own)), d_v
        turned = Rotate.infer(replace(site, types=(one, cos, sin)))
        return (*Concat.infer(replace(site, types=pair)), *turned)


class SwiGLUGradJoined(Operator):
    """`swiglu_grad`: the gradients of gate and up, concatenated: [.., 2 n]."""

    kind = "swiglu_grad_joined"
    operands = ("d", "gate", "up")
    attrs: ClassVar = {"into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        _, gate, up = site.types
        return Concat.infer(replace(site, types=(gate, up)))


class RMSNormQuantize(Operator):
    """`quantize` of `rms_norm`: [.., n] in E4M3, [.., tiles]."""

    kind = "rms_norm_quantize"
    operands = ("x",)
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float, "scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return Quantize.infer(replace(site, types=RMSNorm.infer(site)))


class SwiGLUQuantize(Operator):
    """`quantize` of `swiglu`: [.., n] in E4M3, [.., tiles]."""

    kind = "swiglu_quantize"
    operands = ("gate", "up")
    attrs: ClassVar = {"scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return Quantize.infer(replace(site, types=SwiGLU.infer(site)))


class QuantizeBoth(Operator):
    """`quantize` and `quantize_columns` of the same x, with one kind of scales."""

    kind = "quantize_both"
    operands = ("x", "offs")
    variadic = True  # without ends where there are no experts
    attrs: ClassVar = {"scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        rows = Quantize.infer(replace(site, types=site.types[:1]))
        return (*rows, *QuantizeColumns.infer(site))

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return QuantizeColumns.sizes(site, sizes)


class SwiGLUGradQuantize(Operator):
    """`quantize_both` of `swiglu_grad_joined`, whose halves are whole runs."""

    kind = "swiglu_grad_quantize"
    operands = ("d", "gate", "up", "offs")
    variadic = True
    attrs: ClassVar = {"into": tuple, "scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        _, gate, up, *offs = site.types
        if (gate.last.size or 0) % RUN:
            raise TypeMismatch(f"{cls.kind}: {gate.last.words} ends inside of a run of {RUN}", 1)
        both = Concat.infer(replace(site, types=(gate, up)))
        return QuantizeBoth.infer(replace(site, types=(*both, *offs)))

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return QuantizeColumns.sizes(replace(site, types=site.types[1:]), sizes)
