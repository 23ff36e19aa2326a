"""Random programs that are valid: made with the Builder, from every operator there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from string import ascii_letters, digits
from typing import Any

from hypothesis import strategies as st

from compiler.graph.build import Builder
from compiler.graph.core import Attr, CacheType, Graph, Op, Program, Region, Value, Weight
from compiler.graph.types import FLOATS, Dim, Type
from compiler.ops.base import dims_attr
from compiler.ops.pointwise import POINTWISE
from compiler.ops.quantize import SCALES
from dsl.source import Source, Span

BATCH, SEQ, TOKEN, K = Dim("batch"), Dim("seq"), Dim("token"), Dim("k", 2)
PLACED = Dim("context", axes=("replica", "expert"))

identifiers = st.builds(
    str.__add__,
    st.sampled_from(ascii_letters + "_"),
    st.text(ascii_letters + digits + "_", max_size=6),
)
dims = st.builds(
    lambda name, size: Dim(name, size),  # of a named tuple, builds would draw all fields
    st.lists(identifiers, min_size=1, max_size=3).map("*".join)
    | st.lists(identifiers, min_size=2, max_size=2).map("+".join),
    st.integers(1, 10**6),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
above_one = st.floats(1, exclude_min=True, allow_infinity=False)
positive = st.integers(1, 10**6)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program that the verifier accepts: one to three graphs, later ones call earlier ones."""
    program = Program(draw(identifiers), "")
    spans = _spans(draw)
    width, other = draw(dims), draw(dims)
    for n in range(draw(st.integers(1, 3))):
        graph = Graph(f"{draw(identifiers)}_{n}", _arguments(width, other), about=draw(st.text()))
        graph.span = draw(st.sampled_from(spans))
        maker = Maker(draw, Builder(graph, program.graphs), spans, list(graph.args))
        maker.move_many(TOP, 4, 14)
        if n and draw(st.booleans()):
            _call(maker)
        results = draw(st.lists(st.sampled_from(maker.pool), max_size=4))
        graph.result_names = tuple(draw(identifiers) for _ in results)
        graph.ops.append(Op("return", list(results), spans=maker.some_spans()))
        program.graphs[graph.name] = graph
        program.root = graph.name
    for n, name in enumerate(program.main.weights):
        if "*" not in name and draw(st.booleans()):
            program.aliases[f"copy.{n}"] = name
    return program


def _arguments(width: Dim, other: Dim) -> list[Value]:
    """What it takes to make every operator possible from the start."""
    heads = (BATCH, SEQ, Dim("heads", 4))
    return [
        Value("x", Type("bf16", (BATCH, SEQ, width))),
        Value("y", Type("f32", (BATCH, SEQ, other))),
        Value("position", Type("i64", (BATCH, SEQ))),
        Value("q", Type("bf16", (*heads, Dim("head_dim", 6)))),
        Value("k", Type("bf16", (BATCH, SEQ, Dim("kv_heads", 2), Dim("head_dim", 6)))),
        Value("score", Type("f32", (BATCH, SEQ, Dim("experts", 8)))),
        Value("scalar", Type("f32")),
        Value("placed", Type("bf16", (PLACED, SEQ, width))),
        Value("chosen", Type("i64", (PLACED, SEQ, K))),
        Value("part", Type("f32", (width, other), ("replica", "expert"))),
    ]


def _spans(draw: st.DrawFn) -> list[Span]:
    sources = [Source(draw(st.text(max_size=8)), draw(st.text(max_size=8))) for _ in range(2)]
    return [source.span(0, len(source.text)) for source in sources]


@dataclass
class Maker:
    """Adds operators to one list; `pool` holds the values that are visible there."""

    draw: st.DrawFn
    builder: Builder
    spans: list[Span]
    pool: list[Value]
    experts: int | None = None
    repeats: int = 0
    depth: int = 0

    def move_many(self, moves: list[Move], least: int, most: int) -> None:
        for move in self.draw(st.lists(st.sampled_from(moves), min_size=least, max_size=most)):
            move(self)

    def add(self, kind: str, *operands: Value, symbols: Sequence[str] = (), **more: Any) -> None:
        names = self.draw(st.lists(identifiers, max_size=2))
        spans = self.some_spans()
        self.pool += self.builder.add(kind, operands, symbols, names=names, spans=spans, **more)

    def plain(self, kind: str, *operands: Value, symbols: Sequence[str] = (), **more: Any) -> None:
        """An operator about whose name and place nothing is drawn: long examples are slow."""
        self.pool += self.builder.add(kind, operands, symbols, spans=self.spans[:1], **more)

    def some_spans(self) -> tuple[Span, ...]:
        return tuple(self.draw(st.lists(st.sampled_from(self.spans), min_size=1, max_size=2)))

    def pick(self, fits: Callable[[Type], bool], *, partial: bool = False) -> Value | None:
        """A visible value that fits; the later ones are as likely as the first.

        Most operators do not take a partial sum, so that one must be asked for.
        """
        pool = [value for value in self.pool if partial or not value.type.partial]
        found = [value for value in pool if fits(value.type)]
        return self.draw(st.sampled_from(found)) if found else None

    def floats(self, rank: int) -> Value | None:
        return self.pick(lambda t: t.dtype in FLOATS and len(t.dims) >= rank)

    def weight(self, type: Type) -> str:
        weights = self.builder.graph.weights
        fits = [n for n, w in weights.items() if w.type == type and self.experts in (None, w.stack)]
        fits = [n for n in fits if ("*" in n) == (self.experts is not None)]
        if fits and self.draw(st.booleans()):
            return self.draw(st.sampled_from(fits))
        n = len(weights)
        name = f"experts{n}.*.w.{self.draw(identifiers)}" if self.experts else f"w{n}.weight"
        rest = (self.draw(identifiers), self.draw(numbers), self.draw(st.booleans()))
        weights[name] = Weight(type, *rest, self.experts or 1)
        return name

    def inside(self, arguments: list[Value], **more: Any) -> tuple[Region, Maker]:
        """A region, and what adds operators to it."""
        region = Region(arguments)
        builder = copy(self.builder)  # it shares the names that are taken
        builder.ops = region.ops
        pool = [*self.pool, *arguments]
        around = {"experts": self.experts, "repeats": self.repeats, "depth": self.depth + 1, **more}
        return region, Maker(self.draw, builder, self.spans, pool, **around)


Move = Callable[[Maker], None]


def _linear(m: Maker) -> None:
    if x := m.floats(2):
        to = m.draw(st.just(x.type.last) | dims)
        m.add("linear", x, symbols=(m.weight(Type("bf16", (to, x.type.last))),))


def _embedding(m: Maker) -> None:
    if tokens := m.pick(lambda t: t.dtype == "i64"):
        m.add("embedding", tokens, symbols=(m.weight(Type("bf16", (m.draw(dims), m.draw(dims)))),))


def _rms_norm(m: Maker) -> None:
    if x := m.floats(2):
        weight = m.weight(Type("bf16", (x.type.last,)))
        m.add("rms_norm", x, symbols=(weight,), eps=m.draw(above_one))
        m.add("layer_norm", x, symbols=(weight,), eps=2.0)
        m.add("parameter", symbols=(weight,))


def _pointwise(m: Maker) -> None:
    if x := m.floats(0):
        m.add(m.draw(st.sampled_from([f.kind for f in POINTWISE])), x)
        m.plain("softmax", x)
        m.plain("sum", x)


def _elementwise(m: Maker) -> None:
    if x := m.floats(0):
        y = m.pick(lambda t: t == x.type or (bool(x.type.dims) and _is_broadcast(t, x.type)))
        if y:
            m.add(m.draw(st.sampled_from(["add", "sub", "mul", "div"])), x, y)


def _is_broadcast(t: Type, to: Type) -> bool:
    last = to.dims[len(to.dims) - len(t.dims) :]
    return t == Type("f32") or (t.dtype == to.dtype and t.dims == last)


def _scale(m: Maker) -> None:
    if x := m.floats(0):
        m.add("scale", x, by=m.draw(numbers))
        m.plain("shift", x, by=m.draw(numbers), negated=m.draw(st.booleans()))
        m.plain("reciprocal", x, by=2.0)


def _cast(m: Maker) -> None:
    if x := m.floats(0):
        m.add("cast", x, dtype=m.draw(st.sampled_from(FLOATS)))


def _constant(m: Maker) -> None:
    m.add("constant", value=m.draw(numbers))


def _rope(m: Maker) -> None:
    if position := m.pick(lambda t: t == Type("i64", (BATCH, SEQ))):
        m.add(
            "rope_table", position, dim=6, theta=m.draw(above_one), factor=m.draw(above_one),
            original_max_position_embeddings=m.draw(positive), beta_fast=m.draw(above_one),
            beta_slow=m.draw(above_one), attention_factor=m.draw(numbers),
        )  # fmt: skip
        cos, sin = m.pool[-2:]
        if x := m.pick(lambda t: t.dtype in FLOATS and len(t.dims) > 2 and _even_head(t)):
            m.add(m.draw(st.sampled_from(["rotate", "rotate_halves"])), x, cos, sin)


def _even_head(t: Type) -> bool:
    return t.dims[:2] == (BATCH, SEQ) and t.last.size == 6


def _attention(m: Maker) -> None:
    q = m.pick(lambda t: t.dtype == "bf16" and [d.size for d in t.dims] == [None, None, 4, 6])
    k = m.pick(lambda t: t.dtype == "bf16" and [d.size for d in t.dims] == [None, None, 2, 6])
    if q and k and q.type.last == k.type.last:
        m.add("attention", q, k, k, **_scores(m))
        if m.draw(st.booleans()):
            sinks = m.weight(Type("bf16", (q.type.dims[2],)))
            m.add("parameter", symbols=(sinks,))
            m.add("attention", q, k, k, m.pool[-1], **_scores(m), also=("sinks",))
        position = m.pick(lambda t: t == Type("i64", q.type.dims[:2]))
        if position and q.type.dims[:2] == k.type.dims[:2]:
            m.add("document_attention", q, k, k, position, **_scores(m))


def _indexer(m: Maker) -> None:
    shape = (BATCH, SEQ, Dim("heads", 4), Dim("head_dim", 6))
    q = m.pick(lambda t: t.dtype in FLOATS and t.dims == shape)
    x = m.pick(lambda t: t.dtype == "bf16" and t.dims[:-1] == (BATCH, SEQ))
    if q and x:
        for dim in q.type.dims[:1:-1]:  # a key, then a weight for each head
            weight = m.weight(Type("bf16", (dim, x.type.last)))
            m.add("linear", x, symbols=(weight,))
        key, heads = m.pool[-2:]
        m.add("lightning_indexer", q, key, heads, topk=dims_attr(Dim(m.draw(identifiers), 3)))
        m.add("detach", q)
        m.add("indexer_loss", q, q, q, key, heads, m.pool[-2], scale=m.draw(numbers))


def _scores(m: Maker) -> dict[str, Attr]:
    scores: dict[str, Attr] = {"scale": m.draw(numbers)}
    given = m.draw(st.sets(st.sampled_from(["window", "mask", "softcap"])))
    if "window" in given:
        scores["window"] = m.draw(positive)
    if "mask" in given:
        scores["mask"] = m.draw(st.sampled_from(["q - k < 3 or k < 1", "q // 2 == k // 2"]))
    if "softcap" in given:
        scores["softcap"] = m.draw(above_one)
    return scores


def _latent_attention(m: Maker) -> None:
    q = m.pick(lambda t: t.dtype == "bf16" and t.dims[2:] == (Dim("heads", 4), Dim("head_dim", 6)))
    x = m.pick(lambda t: t.dtype == "bf16" and t.dims[:-1] == (BATCH, SEQ))
    if q and x:
        n, start = m.draw(st.integers(1, 9)), m.draw(st.integers(0, 9))
        weight = m.weight(Type("bf16", (Dim("heads*rows", 4 * (n + start)), q.type.last)))
        rows = dims_attr(Dim(m.draw(identifiers), n))
        m.add("head_linear", q, symbols=(weight,), start=start, rows=rows, transposed=False)
        latent = Dim(m.draw(identifiers), 6)
        m.add("linear", x, symbols=(m.weight(Type("bf16", (latent, x.type.last))),))
        c = m.pool[-1]
        m.add("latent_attention", q, q, c, c, **_scores(m))


def _remember(m: Maker) -> None:
    x = m.pick(lambda t: t.dims[:2] == (BATCH, SEQ) and len(t.dims) > 2)
    if x is None or m.depth:
        return
    graph = m.builder.graph
    kept = [o.kind for o in graph.ops if o.kind.startswith("cache_")]
    kind = kept[0] if kept else m.draw(st.sampled_from(["cache_entry", "cache_append"]))
    entries = tuple(f"{m.draw(identifiers)}_{len(kept)}_{i}" for i in range(2))
    m.add(kind, x, x, entries=entries)
    if kind == "cache_append":
        graph.caches.update((name, CacheType(x.type)) for name in entries)


def _moe(m: Maker) -> None:
    score = m.pick(lambda t: t.dtype == "f32" and len(t.dims) == 3 and t.last.size == 8)
    if score is None or m.experts:
        return
    groups = m.draw(st.sampled_from([1, 2, 4]))
    k = Dim(m.draw(identifiers), m.draw(st.integers(1, 8 // groups)))
    bias = (m.weight(Type("f32", (score.type.last,))),) if m.draw(st.booleans()) else ()
    m.add(
        "topk_groups", score, symbols=bias, k=dims_attr(k), n_group=groups, topk_group=1,
        group_score=m.draw(st.text()), normalize=m.draw(st.booleans()), scale=m.draw(numbers),
    )  # fmt: skip
    route, weight = m.pool[-2:]
    m.add("expert_load", route, count=dims_attr(score.type.last))
    m.plain("identity_weight", route, weight, count=m.draw(st.integers(1, 8)))
    m.add("sequence_balance_loss", score, k=m.draw(st.integers(1, 8)))
    x = m.pick(lambda t: t.dims[:-1] == score.type.dims[:-1] and t.dtype in FLOATS)
    if x and x.type.dims:
        _grouped(m, x, route, weight)
        count = m.draw(st.integers(1, 300))
        token = m.builder.value(m.draw(identifiers), Type(x.type.dtype, (TOKEN, x.type.last)))
        region, expert = m.inside([token], experts=count)
        expert.move_many(ANYWHERE, 1, 4)
        y = expert.pick(lambda t: (t.dtype, t.dims[:1], len(t.dims)) == (x.type.dtype, (TOKEN,), 2))
        assert y
        region.ops.append(Op("yield", [y], spans=m.some_spans()))
        m.add("experts", x, route, weight, regions=[region], count=count)


def _grouped(m: Maker, x: Value, route: Value, weight: Value) -> None:
    """The same as an `experts` region, with one product for all of them."""
    m.add("permute", x, route, count=dims_attr(Dim("experts", 8)))
    rows, ends, order = m.pool[-3:]
    shared = replace(m, experts=8).weight(Type("bf16", (m.draw(dims), x.type.last)))
    m.add("grouped_linear", rows, ends, symbols=(shared,))
    m.add("unpermute", m.pool[-1], order, weight)
    bias = replace(m, experts=8).weight(Type("bf16", (m.draw(dims),)))
    m.plain("grouped_parameter", rows, ends, symbols=(bias,))
    experts = dims_attr(Dim("experts", 8))
    m.plain("quantize", x, scale="ue8m0", parts=())
    m.plain("permute_quantized", *m.pool[-2:], route, count=experts)
    _fp8_products(m, "fp8_grouped_linear", rows, [ends], [shared], experts)


def _fp8(m: Maker) -> None:
    """The three products of one linear layer."""
    whole = m.pick(lambda t: t.dtype in FLOATS and len(t.dims) > 1 and not (t.partial or t.axes))
    if (x := whole) and x.type.last.size is not None:
        out = m.draw(dims)
        symbol = m.weight(Type("bf16", (out, x.type.last)))
        _fp8_products(m, "fp8_linear", x, [], [symbol], ())


def _fp8_products(
    m: Maker, kind: str, x: Value, ends: list[Value], symbols: list[str], experts: tuple[Attr, ...]
) -> None:
    scale, dtype = m.draw(st.sampled_from(SCALES)), "bf16"
    m.plain("quantize", x, scale=scale, parts=())
    quantized = m.pool[-2:]
    m.plain("dequantize", *quantized, dtype=dtype)
    m.plain("pack_e5m6", x)
    m.plain("unpack_e5m6", *m.pool[-2:], into=dims_attr(x.type.last), dtype=dtype)
    m.plain("requantize", *quantized, *ends, scale=scale)
    columns = m.pool[-2:]
    m.plain("fp8_weight", symbols=symbols, scale=scale, experts=experts)
    weight = m.pool[-2:]
    m.plain(kind, *quantized, *ends, *weight, dtype=dtype, parts=())
    y = m.pool[-1]
    m.plain("quantize", y, scale=scale, parts=())
    m.plain(f"{kind}_input_grad", *m.pool[-2:], *ends, *weight, dtype=dtype, parts=())
    m.plain("quantize_columns", y, *ends, scale=scale)
    m.plain(f"{kind}_weight_grad", *m.pool[-2:], *columns, *ends, dtype=dtype)


def _losses(m: Maker) -> None:
    labels = m.pick(lambda t: t == Type("i64", (BATCH, SEQ)))
    logits = m.pick(lambda t: t.dims[:-1] == (BATCH, SEQ) and t.dtype in FLOATS)
    if labels and logits:
        m.add("cross_entropy", logits, labels)
        m.add("count_labels", labels)


def _exchange(m: Maker) -> None:
    route = m.pick(lambda t: t.dtype == "i64" and t.last == K and bool(t.axes))
    x = m.pick(lambda t: t.dtype == "bf16" and bool(t.dims) and bool(t.dims[0].axes))
    if route and x and x.type.dims[:-1] == route.type.dims[:-1]:
        sizes = {"count": 8, "ranks": 4, "nodes": 2, "limit": m.draw(st.integers(1, 2))}
        m.add("dispatch", x, route, **sizes)
        arrived, _, handle = m.pool[-3:]
        m.add("dispatch_again", x, handle, **sizes, k=K.size)
        m.add("combine", arrived, handle, route, **sizes)


def _collective(m: Maker) -> None:
    if x := m.pick(lambda t: bool(t.partial) and _known(t), partial=True):
        axes = m.draw(st.sampled_from([x.type.partial[:1], x.type.partial]))
        group = {"axes": axes, "ranks": 4, "nodes": m.draw(st.sampled_from([1, 2, 4]))}
        m.add("all_reduce", x, **group)
        m.add("reduce_scatter", x, **group)
        m.add("all_gather", m.pool[-1], into=dims_attr(*x.type.dims), **group)


def _known(t: Type) -> bool:
    return bool(t.dims) and all(dim.size and not dim.axes for dim in t.dims)


def _pipeline(m: Maker) -> None:
    if x := m.pick(lambda t: bool(t.axes)):
        m.add("send", x, pipeline=m.draw(st.integers(0, 99)))
        m.add("recv", pipeline=m.draw(st.integers(0, 99)), type=str(x.type))


def _split(m: Maker) -> None:
    if x := m.pick(lambda t: t.dtype in FLOATS and bool(t.dims) and (t.last.size or 0) > 1):
        size = x.type.last.size or 0
        at = m.draw(st.integers(1, size - 1))
        parts = (Dim(m.draw(identifiers), at), Dim(m.draw(identifiers), size - at))
        m.add("split", x, into=dims_attr(*parts))
        m.add("concat", *m.pool[-2:], into=dims_attr(x.type.last))


def _layout(m: Maker) -> None:
    if x := m.pick(lambda t: bool(t.dims) and (t.last.size or 1) % 2 == 0):
        half = (x.type.last.size or 0) // 2
        parts = (Dim(m.draw(identifiers), 2), Dim(m.draw(identifiers), half))
        m.add("unflatten", x, dims=dims_attr(*parts))
        m.add("flatten", m.pool[-1], dims=dims_attr(*parts))
        m.add("broadcast", x, dim=dims_attr(m.draw(dims)))


def _drop(m: Maker) -> None:
    if x := m.pick(lambda t: any(d.name == "seq" for d in t.dims)):
        kind = m.draw(st.sampled_from(["drop_first", "drop_last"]))
        m.add(kind, x, dim="seq", count=m.draw(st.integers(1, 9)))
        m.add("last_entry", m.pool[-1])


def _call(m: Maker) -> None:
    if m.experts is not None or not m.builder.graphs:
        return
    callee = m.builder.graphs[m.draw(st.sampled_from(sorted(m.builder.graphs)))]
    operands = [m.pick(lambda t, a=a: t == a.type, partial=True) for a in callee.args]  # type: ignore[misc]
    assert all(operands)
    if m.draw(st.booleans()):
        for i, x in enumerate(operands):
            if x and SEQ in x.type.dims:
                m.add("drop_first", x, dim="seq", count=1)
                operands[i] = m.pool[-1]
    scope = f"block{len(m.builder.names)}" + f".{m.draw(identifiers)}.*" * m.repeats
    m.builder.names.add(scope)
    m.add("call", *[v for v in operands if v], callee=callee.name, scope=scope)


def _repeat(m: Maker) -> None:
    if m.depth > 2:
        return
    carried = m.draw(st.lists(st.sampled_from(m.pool), max_size=3))
    arguments = [m.builder.value(m.draw(identifiers), v.type) for v in carried]
    region, inner = m.inside(arguments, repeats=m.repeats + 1)
    inner.move_many(ANYWHERE if m.experts else TOP, 1, 5)
    yields = [inner.pick(lambda t, a=a: t == a.type, partial=True) for a in arguments]  # type: ignore[misc]
    more = m.draw(st.lists(st.sampled_from(inner.pool), max_size=2))
    region.ops.append(Op("yield", [v for v in (*yields, *more) if v], spans=m.some_spans()))
    start, count = m.draw(st.integers(0, 99)), m.draw(positive)
    m.add("repeat", *carried, regions=[region], start=start, count=count)


ANYWHERE: list[Move] = [
    _linear, _rms_norm, _embedding, _pointwise, _elementwise, _scale, _cast, _constant, _split,
    _layout, _drop, _rope, _attention, _latent_attention, _indexer, _losses, _repeat,
    _collective, _exchange, _pipeline,
]  # fmt: skip
TOP: list[Move] = [*ANYWHERE, _fp8, _remember, _moe, _call]
