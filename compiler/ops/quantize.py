"""FP8: values in E4M3 with a scale for each tile, and products that accumulate in float32.

A quantized tensor is two values: `q` of type f8e4m3, and the float32 scales that multiply it back.
Rows are cut in runs of 128, the last of which may be shorter: one scale for each run (1 x 128) of
activations and gradients, for each 128 x 128 of weights, for each run of 128 tokens (128 x 1) where
tokens are summed over. Scales are `fp32`, or `ue8m0`: powers of two. DeepSeek-V3 report, section
3.3; `runtime/fp8.py` defines every bit.

`parts` are the sizes of weights that are concatenated by rows; runs restart in each. It is empty
where runs of the whole are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from compiler.graph.core import Attr
from compiler.graph.types import Dim, Type
from compiler.ops.base import Operator, Site, TypeMismatch, dims_of, need_float, need_rank
from compiler.ops.moe import Permute, slots

RUN = 128
FP8 = "f8e4m3"
SCALES = ("fp32", "ue8m0")
CASTS = ("quantize", "quantize_columns", "requantize")


def runs(size: int, parts: Sequence[Attr] = ()) -> int:
    """How many runs of at most 128 a dimension is cut in."""
    sizes = [p for p in parts if isinstance(p, int)] or [size]
    return sum(-(-n // RUN) for n in sizes)


def parts_attr(sizes: Sequence[int]) -> tuple[int, ...]:
    """`parts` of weights with these rows: empty where they make no difference."""
    return () if all(n % RUN == 0 for n in sizes[:-1]) else tuple(sizes)


class Quantize(Operator):
    """x in E4M3, a scale for each run of its last dimension (1 x 128)."""

    kind = "quantize"
    operands = ("x",)
    attrs: ClassVar = {"scale": str, "parts": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 1)
        return _rows(cls.kind, x, site)


class QuantizeColumns(Operator):
    """x in E4M3, a scale for each column of 128 successive tokens (128 x 1).

    x [.., n] -> [tile, n, 128], [tile, n]: the 128 values of a scale are contiguous. With `offs`, x
    is [slot, n] and the tiles restart with each expert: [slot_tile, n, 128].
    """

    kind = "quantize_columns"
    operands = ("x", "offs")
    variadic = True  # without ends where there are no experts
    attrs: ClassVar = {"scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        need_float(cls.kind, site.types[0])
        return _columns(cls.kind, site.types[0], site)

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return _tiles(site, sizes)


class Requantize(Operator):
    """From runs of the last dimension to runs of tokens: multiplied out and quantized again.

    The weight gradient sums over tokens and takes the input that the forward product was made of
    (report, section 3.5.2). q [.., n] and its scales; with `offs` as `quantize_columns`.
    """

    kind = "requantize"
    operands = ("q", "s", "offs")
    variadic = True
    attrs: ClassVar = {"scale": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        _need_fp8(cls.kind, site.types[0], 0)
        return _columns(cls.kind, site.types[0], site)

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return _tiles(site, sizes)


class QuantizeWeight(Operator):
    """Makes the FP8 copy of a weight again: once in an optimizer step, after its update.

    `experts` is their dimension where the weight is that of all experts.
    """

    kind = "quantize_weight"
    symbols = ("weight",)
    attrs: ClassVar = {"scale": str, "experts": tuple}
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        _need_scale(cls.kind, site)
        return ()


class Fp8Weight(Operator):
    """The FP8 copy of weights [out, in] below one another, a scale for every 128 x 128 of each.

    The copy is state: made once in an optimizer step (`quantize_weight`), or read from a
    checkpoint; reading it costs nothing. `experts` is their dimension where the weights are those
    of all experts.
    """

    kind = "fp8_weight"
    symbols = ("weight*",)
    attrs: ClassVar = {"scale": str, "experts": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        _need_scale(cls.kind, site)
        experts = dims_of(site.attrs["experts"])
        rows = [w.dims[0].size or 0 for w in site.weights]
        inside = site.weights[0].last
        name = "+".join(w.dims[0].name for w in site.weights)
        blocks = Dim("row_tiles", sum(map(runs, rows))), Dim("tiles", runs(inside.size or 0))
        q = Type(FP8, (*experts, Dim(name, sum(rows)), inside))
        return (q, Type("f32", (*experts, *blocks)))


class PermuteQuantized(Operator):
    """`permute` of values in E4M3 and their scales, so that tokens travel to experts in FP8.

    q [.., hidden], s [.., tiles], topk_indices [.., k] -> both sorted; offs; sort_indices.
    """

    kind = "permute_quantized"
    sums = "own"
    operands = ("q", "s", "topk_indices")
    attrs: ClassVar = Permute.attrs

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, s, topk_indices = site.types
        _need_fp8(cls.kind, q, 0)
        if s.dims[:-1] != q.dims[:-1]:
            raise TypeMismatch(f"{cls.kind}: the scales {s.words} are of other tokens", 1)
        rows, offs, sort_indices = Permute.infer(Site((q, topk_indices), attrs=site.attrs))
        return (rows, s.with_dims(rows.dims[0], s.last), offs, sort_indices)

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return {"slot": slots(site, site.types[2], sizes)}


class Fp8Linear(Operator):
    """`linear` in FP8: for each 128 of x a product of its own, times both scales, into float32.

    q [.., in], its scales, the weights [out, in] and theirs.
    """

    kind = "fp8_linear"
    operands: ClassVar[tuple[str, ...]] = ("q", "s", "wq", "ws")
    attrs: ClassVar = {"dtype": str, "parts": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, s, wq, ws = site.types[0], site.types[1], site.types[-2], site.types[-1]
        _need_product(cls.kind, q, s, wq, ws, site)
        if wq.last != q.last or ws.last.size != s.last.size:
            raise TypeMismatch(f"{cls.kind} expects {wq.last.words}, got {q.last.words}", 0)
        return (Type(site.text("dtype"), (*q.dims[:-1], wq.dims[-2])),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * (site.types[-2].dims[-2].size or 0)


class Fp8LinearInputGrad(Operator):
    """`linear_input_grad` in FP8: dy in runs of its last dimension, the same weights and scales."""

    kind = "fp8_linear_input_grad"
    operands: ClassVar[tuple[str, ...]] = ("q", "s", "wq", "ws")
    attrs: ClassVar = {"dtype": str, "parts": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, s, wq, ws = site.types[0], site.types[1], site.types[-2], site.types[-1]
        _need_product(cls.kind, q, s, wq, ws, site)
        if wq.dims[-2].size != q.last.size or ws.dims[-2].size != s.last.size:
            raise TypeMismatch(f"{cls.kind} expects {wq.dims[-2].words}, got {q.last.words}", 0)
        return (Type(site.text("dtype"), (*q.dims[:-1], wq.last)),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * (site.types[-2].last.size or 0)


class Fp8LinearWeightGrad(Operator):
    """`linear_weight_grad` in FP8: both operands in runs of 128 tokens.

    dy [tile, out, 128], its scales [tile, out], x [tile, in, 128], its scales [tile, in] ->
    [out, in].
    """

    kind = "fp8_linear_weight_grad"
    weight_product = True
    operands: ClassVar[tuple[str, ...]] = ("dq", "ds", "q", "s")
    attrs: ClassVar = {"dtype": str}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        dq, _, q, _ = site.types[:4]
        _need_fp8(cls.kind, dq, 0)
        _need_fp8(cls.kind, q, 2)
        if len(dq.dims) != 3 or (dq.dims[0], dq.last) != (q.dims[0], q.last):
            raise TypeMismatch(f"{cls.kind}: {dq.words} is not about the tokens of {q.words}", 0)
        experts = site.types[4].dims if len(site.types) > 4 else ()
        return (Type(site.text("dtype"), (*experts, dq.dims[1], q.dims[1])),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        """Those of whole tiles of tokens; of experts, whose tiles are padded, of slots."""
        tile, out, run = site.types[0].dims
        rows = tile.at(sizes) * run.at(sizes) if tile.name == "tile" else sizes["slot"]
        return 2 * rows * out.at(sizes) * site.types[2].dims[1].at(sizes)


class Fp8GroupedLinear(Fp8Linear):
    """`grouped_linear` in FP8: q [slot, in], its scales, offs, all experts' weights, theirs."""

    kind = "fp8_grouped_linear"
    operands = ("q", "s", "offs", "wq", "ws")


class Fp8GroupedLinearInputGrad(Fp8LinearInputGrad):
    """`grouped_linear_input_grad` in FP8: dy [slot, out], its scales, offs, weights, theirs."""

    kind = "fp8_grouped_linear_input_grad"
    operands = ("q", "s", "offs", "wq", "ws")


class Fp8GroupedLinearWeightGrad(Fp8LinearWeightGrad):
    """`grouped_linear_weight_grad` in FP8; the runs of tokens restart with each expert."""

    kind = "fp8_grouped_linear_weight_grad"
    operands = ("dq", "ds", "q", "s", "offs")


def _rows(kind: str, x: Type, site: Site) -> tuple[Type, Type]:
    _need_scale(kind, site)
    size, parts = x.last.size or 0, site.parts
    if parts and sum(parts) != size:
        raise TypeMismatch(f"{kind}: the parts {parts} are not {x.last.words}", 0)
    return x.with_dtype(FP8), Type("f32", (*x.dims[:-1], Dim("tiles", runs(size, parts))))


def _columns(kind: str, x: Type, site: Site) -> tuple[Type, Type]:
    _need_scale(kind, site)
    need_rank(kind, x, 2)
    axes = tuple(axis for d in x.dims[:-1] for axis in d.axes)
    tile = Dim("slot_tile" if _ends(site) else "tile", axes=axes)
    return Type(FP8, (tile, x.last, Dim("run", RUN))), Type("f32", (tile, x.last))


def _tiles(site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
    """The tiles of tokens that there are, or those that there may be with any number of slots for
    each expert."""
    x, offs = site.types[0], _ends(site)
    rows = x.count(sizes) // (x.last.size or 1)
    return {"slot_tile": rows // RUN + offs[-1].count()} if offs else {"tile": -(-rows // RUN)}


def _ends(site: Site) -> list[Type]:
    """Of the operands, that which says where the slots of experts end."""
    return [t for t in site.types if t.dtype == "i32"]


def _need_product(kind: str, q: Type, s: Type, wq: Type, ws: Type, site: Site) -> None:
    _need_fp8(kind, q, 0)
    _need_fp8(kind, wq, len(site.types) - 2)
    if s.dims[:-1] != q.dims[:-1] or ws.dims[:-2] != wq.dims[:-2]:
        raise TypeMismatch(f"{kind}: the scales {s.words}, {ws.words} are of other tensors", 1)


def _need_fp8(kind: str, q: Type, operand: int) -> None:
    if q.dtype != FP8:
        raise TypeMismatch(f"{kind} needs numbers in {FP8}, got {q.dtype}", operand)


def _need_scale(kind: str, site: Site) -> None:
    if site.attrs["scale"] not in SCALES:
        raise TypeMismatch(f"{kind} knows the scales {', '.join(SCALES)}")
