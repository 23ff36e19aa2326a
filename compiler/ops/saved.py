"""Formats in which activations are saved: what encodes them, and what reads them back.

FP8 is encoded by `quantize`. E5M6 is 12 bits per element: a sign, five exponent bits, six fraction
bits, with a scale for each run of 128 in a row, a power of two (DeepSeek-V3 report, section 3.3.3);
`runtime/e5m6.py` defines every bit.
"""

from __future__ import annotations

from typing import ClassVar

from compiler.graph.types import FLOATS, Dim, Type
from compiler.ops.base import Operator, Site, TypeMismatch, dims_of, need_float, need_rank
from compiler.ops.quantize import FP8, runs


class Dequantize(Operator):
    """What `quantize` gave, multiplied back: q [.., n], s [.., tiles] -> [.., n]."""

    kind = "dequantize"
    operands = ("q", "s")
    attrs: ClassVar = {"dtype": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, _ = site.types
        _need_encoded(cls.kind, site, FP8, q.last.size or 0)
        return (q.with_dtype(site.text("dtype")),)


class PackE5M6(Operator):
    """x in E5M6, two elements in three bytes, and a scale for each run of its last dimension."""

    kind = "pack_e5m6"
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        size = x.last.size or 0
        scales = Dim("tiles", runs(size))
        return x.with_last(_packed(x.last)).with_dtype("u8"), x.with_last(scales).with_dtype("f32")


class UnpackE5M6(Operator):
    """What `pack_e5m6` gave of a last dimension `into`: packed [.., bytes], s [.., tiles]."""

    kind = "unpack_e5m6"
    operands = ("packed", "s")
    attrs: ClassVar = {"into": tuple, "dtype": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        packed, _ = site.types
        (into,) = dims_of(site.attrs["into"])
        if packed.last.size != _packed(into).size:
            words = f"{_packed(into).size} bytes for {into.words}, got {packed.last.words}"
            raise TypeMismatch(f"{cls.kind} expects {words}", 0)
        _need_encoded(cls.kind, site, "u8", into.size or 0)
        return (packed.with_last(into).with_dtype(site.text("dtype")),)


def _packed(dim: Dim) -> Dim:
    """Two elements to three bytes."""
    return Dim("packed", 3 * -(-(dim.size or 0) // 2))


def _need_encoded(kind: str, site: Site, dtype: str, size: int) -> None:
    """Numbers in `dtype`, `size` in a row, and the scale of each run of them."""
    q, s = site.types
    if q.dtype != dtype:
        raise TypeMismatch(f"{kind} needs numbers in {dtype}, got {q.dtype}", 0)
    if s != Type("f32", (*q.dims[:-1], Dim("tiles", runs(size)))):
        raise TypeMismatch(f"{kind}: the scales {s.words} are of other numbers than {q.words}", 1)
    if site.text("dtype") not in FLOATS:
        raise TypeMismatch(f"{kind} gives {' or '.join(FLOATS)}, not {site.text('dtype')}")
