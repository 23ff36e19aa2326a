"""Rotary embedding, attention and what a decoder remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import Dim, Type
from compiler.ops import mask
from compiler.ops.base import Adjoint, Operator, Site, TypeMismatch, need_float, need_rank

QK_RANK = 4
# Below these the frequencies of rotary embedding are not defined.
_LEAST = {
    "theta": 1,
    "factor": 0,
    "original_max_position_embeddings": 0,
    "beta_fast": 0,
    "beta_slow": 0,
}


class RopeTable(Operator):
    """cos and sin of position * frequency, [batch, seq, dim / 2] in float32.

    Frequencies theta^(-2i/dim); with factor > 1 those of YaRN (arXiv 2309.00071), whose amplitude
    is `attention_factor`.
    """

    kind = "rope_table"
    differentiable = False
    operands = ("position",)
    hoist = True
    attrs: ClassVar = {
        "dim": int,
        "theta": float,
        "factor": float,
        "original_max_position_embeddings": int,
        "beta_fast": float,
        "beta_slow": float,
        "attention_factor": float,
    }

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (position,) = site.types
        if position.dtype not in ("i32", "i64"):
            raise TypeMismatch(f"rope_table needs whole positions, got {position.dtype}", 0)
        if site.number("dim") < 2 or site.number("dim") % 2:
            raise TypeMismatch(f"rope_table turns pairs of numbers, not {site.number('dim')}")
        for name, least in _LEAST.items():
            if not (value := site.real(name)) > least:
                raise TypeMismatch(f"rope_table needs a {name} above {least}, got {value:g}")
        half = Dim("pair", site.number("dim") // 2)
        table = Type("f32", (*position.dims, half))
        return table, table


class Rotate(Operator):
    """Rotary embedding of the last dimension: pairs (2i, 2i+1) turned by the angle of the table.

    x [batch, seq, dim] or [batch, seq, heads, dim]; computed in float32, cast back.
    """

    kind = "rotate"
    cheap = True
    operands = ("x", "cos", "sin")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, cos, _ = site.types
        need_float(cls.kind, x)
        need_rank(cls.kind, x, 3)
        if x.last.size != 2 * (cos.last.size or 0):
            raise TypeMismatch(
                f"rotate of {x.last.words} by a table for {2 * (cos.last.size or 0)} numbers", 0
            )
        if x.dims[:2] != cos.dims[:2]:
            raise TypeMismatch(f"rotate of {x.words} by a table for {cos.words}", 1)
        return (x,)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """Turned back: by the same angles, the other way."""
        x, cos, sin = op.operands
        if d[0] is None:
            return [None, None, None]
        (back,) = at.add("scale", [sin], names=[f"minus_{sin.name}"], by=-1.0)
        return [*at.add("rotate", [d[0], cos, back], names=[f"d_{x.name}"]), None, None]


SCORES: Mapping[str, type] = {"scale": float, "window?": int, "mask?": str, "softcap?": float}
"""How products of queries and keys become scores, alike for every kind of attention. A query sees
itself and the `window - 1` keys before it, all without; of these those that `mask` holds for, a
condition over the positions q and k. `softcap` c makes c tanh(s / c) of each score s."""


def scores_of(op: Op) -> dict[str, Any]:
    """What another operator takes over from an attention."""
    return dict(op.attrs)


def need_scores(site: Site) -> None:
    """Raises `TypeMismatch` for values of `SCORES` that no attention can have."""
    if not 1 <= site.attrs.get("window", 1) < 2**31:  # type: ignore[operator]
        raise TypeMismatch(
            f"attention needs a window of 1 to 2**31 - 1 tokens, got {site.number('window')}",
            help="a window of 1 is the query's own token; leave it out to see all before it",
        )
    if not site.attrs.get("softcap", 1.0) > 0:  # type: ignore[operator]
        raise TypeMismatch(
            f"attention needs a softcap above 0, got {site.real('softcap'):g}",
            help="scores stay below it; leave it out where they are not capped",
        )
    if "mask" in site.attrs:
        mask.parse(site.text("mask"))


def seen_pairs(site: Site, sizes: Mapping[str, int], queries: Dim, keys: Dim) -> int:
    """Pairs of a query and a key whose score counts; what `mask` leaves out is not taken off."""
    n, m = queries.at(sizes), keys.at(sizes)
    window = site.number("window") if "window" in site.attrs else m
    if queries != keys:  # a decoder's query sees all, or its window of them
        return n * min(m, window)
    # Over one stretch of tokens a query sees half of the keys, less those before its window.
    return (n * n - max(0, n - window) ** 2) // 2


class Attention(Operator):
    """softmax(scale * q k^T) v, causal, softmax in float32; the last query meets the last key.

    q [batch, seq, heads, d], k [batch, context, kv_heads, d], v [batch, context, kv_heads, e]
    -> [batch, seq, heads, e]. With fewer kv_heads, each serves heads / kv_heads queries. A query
    sees itself and the `window - 1` keys before it; of these those that `mask` holds for, a
    condition over the positions q and k. `softcap` c makes c tanh(s / c) of each score s.
    """

    kind = "attention"
    tiled_twice = True
    saving: ClassVar[tuple[str, ...]] = ("attention_saving", "lse")
    operands: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    attrs: ClassVar = SCORES

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, k, v = site.types[:3]
        need_scores(site)
        for i, x in enumerate((q, k, v)):
            need_float(cls.kind, x, i)
            if len(x.dims) != QK_RANK:
                raise TypeMismatch(f"attention needs [batch, seq, heads, dim], got {x.words}", i)
        if q.last != k.last:
            raise TypeMismatch(
                f"attention needs equal q and k: {q.last.words} does not meet {k.last.words}", 1
            )
        if k.dims[:3] != v.dims[:3]:
            raise TypeMismatch(f"attention needs a value for each key: {k.words}, {v.words}", 2)
        heads, kv_heads = q.dims[2].size or 0, k.dims[2].size or 1
        if heads % kv_heads:
            raise TypeMismatch(
                f"{q.dims[2].words} is not a multiple of {k.dims[2].words}",
                1,
                "each head of keys serves an equal number of heads of queries",
            )
        return (q.with_last(v.last),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        q, k, v = site.types[:3]
        dim = (q.last.size or 0) + (v.last.size or 0)
        pairs = seen_pairs(site, sizes, q.dims[1], k.dims[1])
        return 2 * q.dims[0].at(sizes) * (q.dims[2].size or 0) * dim * pairs

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """From the results of `attention_saving`, which stands in its place by then."""
        if d[0] is None:
            return [None, None, None]
        return at.add(
            "attention_grad", [d[0], *op.operands, *op.results],
            names=[f"d_{v.name}" for v in op.operands], **scores_of(op),
        )  # fmt: skip


class DocumentAttention(Attention):
    """`attention` of whole sequences, in which a query sees keys of its own document only.

    position [batch, seq] counts on within a document and begins anew with the next one.
    """

    kind = "document_attention"
    tiled_twice = True
    saving: ClassVar[tuple[str, ...]] = ("document_attention_saving", "lse")
    operands = ("q", "k", "v", "position")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, k, _, position = site.types
        found = super().infer(site)
        if k.dims[:2] != q.dims[:2]:
            raise TypeMismatch(f"a key for each query is needed: {q.words}, {k.words}", 1)
        if position != Type("i64", q.dims[:2]):
            raise TypeMismatch(f"a position for each query is needed, got {position.words}", 3)
        return found

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """As that of `attention`; positions have none."""
        if d[0] is None:
            return [None, None, None, None]
        found = at.add(
            "document_attention_grad", [d[0], *op.operands, *op.results],
            names=[f"d_{v.name}" for v in op.operands[:3]], **scores_of(op),
        )  # fmt: skip
        return [*found, None]


class LatentAttention(Operator):
    """softmax(scale * (q_latent c + q_rope k_rope)) c, causal: all heads read the same latents.

    q_latent [batch, seq, heads, c], q_rope [batch, seq, heads, r], c_kv [batch, context, c],
    k_rope [batch, context, r] -> [batch, seq, heads, c]. DeepSeek-V2 report, section 2.1.2.
    """

    kind = "latent_attention"
    tiled_twice = True
    operands = ("q_latent", "q_rope", "c_kv", "k_rope")
    attrs: ClassVar = SCORES

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q_latent, q_rope, c_kv, k_rope = site.types
        need_scores(site)
        for i, (q, k) in enumerate([(q_latent, c_kv), (q_rope, k_rope)]):
            if len(q.dims) != QK_RANK or len(k.dims) != QK_RANK - 1 or q.last.size != k.last.size:
                raise TypeMismatch(f"latent_attention: {q.words} does not meet {k.words}", i)
        if q_latent.dims[:3] != q_rope.dims[:3] or c_kv.dims[:2] != k_rope.dims[:2]:
            raise TypeMismatch("latent_attention needs a latent for each rotated key", 3)
        return (q_latent,)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        q, q_rope, c_kv, _ = site.types
        dim = 2 * (q.last.size or 0) + (q_rope.last.size or 0)
        pairs = seen_pairs(site, sizes, q.dims[1], c_kv.dims[1])
        return 2 * q.dims[0].at(sizes) * (q.dims[2].size or 0) * dim * pairs


class CacheEntry(Operator):
    """Marks what a decoder must remember; the same values when nothing is remembered."""

    kind = "cache_entry"
    view = True
    variadic = True
    attrs: ClassVar = {"entries": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        for i, x in enumerate(site.types):
            need_rank(cls.kind, x, 3, i)
        return site.types


class CacheAppend(Operator):
    """Writes new entries behind those in the cache and gives all: `seq` becomes `context`."""

    kind = "cache_append"
    variadic = True
    pure = False
    attrs: ClassVar = {"entries": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return tuple(x.with_dims(x.dims[0], Dim("context"), *x.dims[2:]) for x in site.types)
