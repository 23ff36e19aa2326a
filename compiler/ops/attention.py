"""Rotary embedding, attention and what a decoder remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import Dim, Type
from compiler.ops import mask
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    TypeMismatch,
    dims_of,
    need_float,
    need_rank,
    only,
)

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
        (back,) = at.add("scale", [sin], names=[f"minus_{sin.name}"], by=-1.0)
        return [*at.add(cls.kind, [only(d), cos, back], names=[f"d_{x.name}"]), None, None]


class RotateHalves(Rotate):
    """Rotary embedding of the last dimension: pairs (i, i + dim / 2) turned by the angle of the
    table, as in GPT-NeoX and Llama of transformers.

    x [batch, seq, dim] or [batch, seq, heads, dim]; computed in float32, cast back.
    """

    kind = "rotate_halves"


SCORES: Mapping[str, type] = {
    "scale": float,
    "window?": int,
    "mask?": str,
    "softcap?": float,
    "also?": tuple,
}
"""How products of queries and keys become scores, alike for every kind of attention. A query sees
itself and the `window - 1` keys before it, all without; of these those that `mask` holds for, a
condition over the positions q and k. `softcap` c makes c tanh(s / c) of each score s. `also` names
the operands after those that every attention has, among `ALSO`."""

ALSO = ("selected", "sinks")
"""`selected` i64 [batch, seq, n]: the keys that a query sees, by position, -1 for none. `sinks`
[heads]: of each head a score that no key has; its exponential is in the softmax's denominator."""


def scores_of(op: Op) -> dict[str, Any]:
    """What another operator takes over from an attention."""
    return dict(op.attrs)


def also_of(op: Op) -> dict[str, Value]:
    """The operands of an attention that `also` names."""
    names = op.texts("also") if "also" in op.attrs else ()
    return dict(zip(names, op.operands[len(op.operands) - len(names) :], strict=True))


def also_types(site: Site) -> dict[str, Type]:
    """Their types; they are the last operands of an attention and of its gradient."""
    names = site.texts("also") if "also" in site.attrs else ()
    return dict(zip(names, site.types[len(site.types) - len(names) :], strict=True))


def need_scores(site: Site, operands: int, q: Type) -> None:
    """Raises `TypeMismatch` for values of `SCORES` that no attention can have, and for operands
    after the first `operands` that do not match queries q."""
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
    _need_also(site, operands, q)


def _need_also(site: Site, operands: int, q: Type) -> None:
    names = site.texts("also") if "also" in site.attrs else ()
    ordered = tuple(name for name in ALSO if name in names)
    if names != ordered or ("also" in site.attrs and not names):
        raise TypeMismatch(f"attention takes {', '.join(ALSO)} besides, in order, not {names}")
    if (count := len(site.types)) != operands + len(names):
        raise TypeMismatch(f"attention takes {operands + len(names)} tensors, got {count}")
    if "selected" in names and (both := {"window", "mask"} & site.attrs.keys()):
        raise TypeMismatch(
            f"selected keys do not go with a {min(both)}: a query might see no key",
            help="let what selects the keys leave out those that a query shall not see",
        )
    for i, (name, type) in enumerate(also_types(site).items(), operands):
        if name == "sinks":
            need_float("attention", type, i)
            if type.dims != q.dims[2:3]:
                raise TypeMismatch(f"attention needs a sink for {q.dims[2].words}, got {type}", i)
        elif type.dtype != "i64" or type.dims[:-1] != q.dims[:2] or not type.last.size:
            raise TypeMismatch(f"attention needs selected keys i64[batch, seq, n], got {type}", i)


def seen_pairs(site: Site, sizes: Mapping[str, int], queries: Dim, keys: Dim) -> int:
    """Pairs of a query and a key whose score counts; what `mask` leaves out is not taken off. As
    many keys are selected as a window holds."""
    n, m = queries.at(sizes), keys.at(sizes)
    window = site.number("window") if "window" in site.attrs else m
    if (selected := also_types(site).get("selected")) is not None:
        window = min(window, selected.last.size or m)
    if queries != keys:  # a decoder's query sees all, or its window of them
        return n * min(m, window)
    # Over one stretch of tokens a query sees half of the keys, less those before its window.
    return (n * n - max(0, n - window) ** 2) // 2


class Attention(Operator):
    """softmax(scale * q k^T) v, causal, softmax in float32; the last query meets the last key.

    q [batch, seq, heads, d], k [batch, context, kv_heads, d], v [batch, context, kv_heads, e]
    -> [batch, seq, heads, e]. With fewer kv_heads, each serves heads / kv_heads queries. A query
    sees itself and the `window - 1` keys before it; of these those that `mask` holds for, a
    condition over the positions q and k. `softcap` c makes c tanh(s / c) of each score s. `also`
    names further operands: `selected` i64 [batch, seq, n], the keys that a query sees of these, -1
    for none, and `sinks` [heads], scores of no key, whose exponentials are in the denominator.
    """

    kind = "attention"
    variadic = True
    tiled_twice = True
    saving: ClassVar[tuple[str, ...]] = ("attention_saving", "lse")
    gradient: ClassVar[str] = "attention_grad"
    operands: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    attrs: ClassVar = SCORES

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        if len(site.types) < len(cls.operands):
            raise TypeMismatch(f"{cls.kind} takes {', '.join(cls.operands)}")
        q, k, v = site.types[:3]
        for i, x in enumerate((q, k, v)):
            need_float(cls.kind, x, i)
            if len(x.dims) != QK_RANK:
                raise TypeMismatch(f"attention needs [batch, seq, heads, dim], got {x.words}", i)
        need_scores(site, len(cls.operands), q)
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
        """From the results of `.._saving`, which stands in its place by then; positions and
        selected keys have none."""
        also, count = also_of(op), len(cls.operands)
        given = op.operands[:count]
        real = [*given[:3], *(v for name, v in also.items() if name == "sinks")]
        dq, dk, dv, *d_sinks = at.add(
            cls.gradient, [only(d), *given, *op.results, *also.values()],
            names=[f"d_{v.name}" for v in real], **scores_of(op),
        )  # fmt: skip
        none = [None] * (count - 3 + len(also) - len(d_sinks))
        return [dq, dk, dv, *none, *d_sinks]


class DocumentAttention(Attention):
    """`attention` of whole sequences, in which a query sees keys of its own document only.

    position [batch, seq] counts up within a document and restarts at 0 with the next one.
    """

    kind = "document_attention"
    tiled_twice = True
    saving: ClassVar[tuple[str, ...]] = ("document_attention_saving", "lse")
    gradient = "document_attention_grad"
    operands = ("q", "k", "v", "position")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        found = super().infer(site)
        q, k, _, position = site.types[:4]
        if k.dims[:2] != q.dims[:2]:
            raise TypeMismatch(f"a key for each query is needed: {q.words}, {k.words}", 1)
        if position != Type("i64", q.dims[:2]):
            raise TypeMismatch(f"a position for each query is needed, got {position.words}", 3)
        return found


class LatentAttention(Operator):
    """softmax(scale * (q_latent c + q_rope k_rope)) c, causal: all heads read the same latents.

    q_latent [batch, seq, heads, c], q_rope [batch, seq, heads, r], c_kv [batch, context, c],
    k_rope [batch, context, r] -> [batch, seq, heads, c]. DeepSeek-V2 report, section 2.1.2.
    """

    kind = "latent_attention"
    variadic = True
    tiled_twice = True
    operands = ("q_latent", "q_rope", "c_kv", "k_rope")
    attrs: ClassVar = SCORES

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        if len(site.types) < len(cls.operands):
            raise TypeMismatch(f"{cls.kind} takes {', '.join(cls.operands)}")
        q_latent, q_rope, c_kv, k_rope = site.types[:4]
        for i, (q, k) in enumerate([(q_latent, c_kv), (q_rope, k_rope)]):
            if len(q.dims) != QK_RANK or len(k.dims) != QK_RANK - 1 or q.last.size != k.last.size:
                raise TypeMismatch(f"latent_attention: {q.words} does not meet {k.words}", i)
        if q_latent.dims[:3] != q_rope.dims[:3] or c_kv.dims[:2] != k_rope.dims[:2]:
            raise TypeMismatch("latent_attention needs a latent for each rotated key", 3)
        need_scores(site, len(cls.operands), q_latent)
        return (q_latent,)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        q, q_rope, c_kv = site.types[:3]
        dim = 2 * (q.last.size or 0) + (q_rope.last.size or 0)
        pairs = seen_pairs(site, sizes, q.dims[1], c_kv.dims[1])
        return 2 * q.dims[0].at(sizes) * (q.dims[2].size or 0) * dim * pairs


class LightningIndexer(Operator):
    """The `topk` keys with the highest index score for each query, of those that do not come later:
    sum_h weight_h relu(q_h . k) (DeepSeek-V3.2 report, equation 1).

    q [batch, seq, heads, d], k [batch, context, d], weight [batch, seq, heads] -> i64 [batch, seq,
    topk], -1 where there are fewer keys. Scores are computed in float32; of equal ones the first
    key wins. No gradient follows from a choice: `indexer_loss` trains what it is made of.
    """

    kind = "lightning_indexer"
    differentiable = False
    operands = ("q", "k", "weight")
    attrs: ClassVar = {"topk": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (topk,) = dims_of(site.attrs["topk"])
        need_index(cls.kind, site.types)
        if not topk.size:
            raise TypeMismatch(f"{cls.kind} selects at least 1 key, not {topk.size}")
        return (Type("i64", (*site.types[0].dims[:2], topk)),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return index_flops(site.types, sizes)


def need_index(kind: str, types: Sequence[Type]) -> None:
    """Raises `TypeMismatch` unless types are those of an indexer's queries, keys and weights."""
    q, k, weight = types
    for i, x in enumerate(types):
        need_float(kind, x, i)
    if len(q.dims) != QK_RANK or len(k.dims) != QK_RANK - 1:
        raise TypeMismatch(
            f"{kind} needs queries [batch, seq, heads, dim] and keys [batch, seq, dim], got "
            f"{q.words}, {k.words}", 1,
        )  # fmt: skip
    if q.last != k.last or q.dims[0] != k.dims[0]:
        raise TypeMismatch(f"{kind} of queries {q.words} and keys {k.words}", 1)
    if weight.dims != q.dims[:3]:
        raise TypeMismatch(
            f"{kind} needs a weight for each head of {q.words}, got {weight.words}", 2
        )


def index_flops(types: Sequence[Type], sizes: Mapping[str, int]) -> int:
    """Of all index scores; over one stretch of tokens a query has half of the keys before it."""
    q, k = types[:2]
    n, m = q.dims[1].at(sizes), k.dims[1].at(sizes)
    pairs = n * m if q.dims[1] != k.dims[1] else n * n // 2
    return 2 * q.dims[0].at(sizes) * (q.dims[2].size or 0) * (q.last.size or 0) * pairs


class IndexerLoss(Operator):
    """How far index scores are from what attention makes of the keys that they selected.

    The mean over queries of KL(p || softmax(I)), both over the selected keys: I the index scores of
    `lightning_indexer`, p the sum over heads of softmax(scale q k^T), divided by their number
    (DeepSeek-V3.2 report, equation 4). Attention is the teacher: q and k get no gradient. q and k
    are those of attention, then those of the indexer and its weights, then the selected keys.
    """

    kind = "indexer_loss"
    operands = ("q", "k", "index_q", "index_k", "weight", "selected")
    attrs: ClassVar = {"scale": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        q, k = site.types[:2]
        need_index(cls.kind, site.types[2:5])
        selected = site.types[5]
        fits = (
            len(q.dims) == len(k.dims) == QK_RANK and q.last == k.last and q.dims[:2] == k.dims[:2]
        )
        if not fits or (q.dims[2].size or 0) % (k.dims[2].size or 1):
            raise TypeMismatch(f"{cls.kind} of queries {q.words} and keys {k.words}", 1)
        if selected.dtype != "i64" or selected.dims[:-1] != q.dims[:2]:
            raise TypeMismatch(f"{cls.kind} needs selected keys of each query, got {selected}", 5)
        if site.types[2].dims[:2] != q.dims[:2] or site.types[3].dims[:2] != q.dims[:2]:
            raise TypeMismatch(f"{cls.kind} compares attention and indexer of the same tokens", 2)
        return (Type("f32"),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        q = site.types[0]
        pairs = q.dims[1].at(sizes) ** 2 // 2
        width = (q.dims[2].size or 0) * (q.last.size or 0)
        return 2 * q.dims[0].at(sizes) * width * pairs + index_flops(site.types[2:4], sizes)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        found = at.add(
            "indexer_loss_grad", [only(d), *op.operands],
            names=[f"d_{v.name}" for v in op.operands[2:5]], scale=op.attrs["scale"],
        )  # fmt: skip
        return [None, None, *found, None]


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
    """Appends new entries to the cache and gives all: `seq` becomes `context`."""

    kind = "cache_append"
    variadic = True
    pure = False
    attrs: ClassVar = {"entries": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return tuple(x.with_dims(x.dims[0], Dim("context"), *x.dims[2:]) for x in site.types)
