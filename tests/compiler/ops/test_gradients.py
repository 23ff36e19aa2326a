"""The derivative of each operator against torch.autograd, in float64, on random shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Graph, Op, Program, Value, Weight
from compiler.graph.types import FLOATS, Dim, Type
from compiler.ops import OPS
from compiler.ops.base import Operator, dims_attr
from compiler.ops.pointwise import POINTWISE
from runtime import functional as F
from tests.interpret import State, random_weights, run

BATCH, SEQ, SLOT = Dim("batch"), Dim("seq"), Dim("slot")


@dataclass
class Example:
    """One use of an operator, with numbers."""

    kind: str
    operands: list[tuple[Type, Tensor]]
    weights: dict[str, Weight] = field(default_factory=dict)
    attrs: dict[str, Attr] = field(default_factory=dict)
    plain: Callable[..., Tensor] | None = None
    """What it computes, where torch's autograd cannot follow the operator itself."""
    fixed: tuple[int, ...] = ()
    """Operands that no weight reaches, so that they have no derivative."""


@dataclass
class Draw:
    """Numbers for an example. `randn` and the like follow from a seed that is drawn."""

    draw: st.DrawFn

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.draw(st.integers(0, 2**32)))
        self.batch, self.seq = self.size(1, 3), self.size(1, 6)

    def size(self, least: int = 1, most: int = 8) -> int:
        return self.draw(st.integers(least, most))

    def choice(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def floats(self, *dims: Dim) -> tuple[Type, Tensor]:
        """Sometimes on a coarse grid, so that values are equal to one another."""
        shape = [d.at({"batch": self.batch, "seq": self.seq}) for d in dims]
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return Type("f32", dims), values.round() if self.choice(False, False, True) else values

    def tokens(self, *last: Dim) -> tuple[Type, Tensor]:
        return self.floats(BATCH, SEQ, *last)

    def below(self, limit: int, *dims: Dim) -> tuple[Type, Tensor]:
        shape = [d.at({"batch": self.batch, "seq": self.seq}) for d in dims]
        return Type("i64", dims), torch.randint(limit, shape, generator=self.generator)

    def labels(self, limit: int) -> tuple[Type, Tensor]:
        type, labels = self.below(limit, BATCH, SEQ)
        left_out = torch.rand(labels.shape, generator=self.generator) < self.choice(0.0, 0.3, 1.0)
        return type, labels.masked_fill(left_out, F.IGNORED_LABEL)

    def route(self, experts: int, k: int) -> tuple[Type, Tensor]:
        """Distinct experts for each token; many have none where there are more than tokens."""
        scores = torch.rand(self.batch, self.seq, experts, generator=self.generator)
        return Type("i64", (BATCH, SEQ, Dim("k", k))), scores.topk(k).indices

    def dim(self, name: str, least: int = 1, most: int = 8) -> Dim:
        return Dim(name, self.size(least, most))


# ---- one example of each operator ------------------------------------------------------------


def _linear(d: Draw) -> Example:
    width = d.dim("in")
    outs = [d.dim(f"out{i}") for i in range(d.size(1, _most_weights("linear")))]
    weights = {f"w{i}.weight": Weight(Type("f32", (out, width))) for i, out in enumerate(outs)}
    return Example("linear", [d.tokens(width)], weights)


def _most_weights(kind: str) -> int:
    return 3 if OPS[kind].symbols[-1].endswith("*") else 1


def _embedding(d: Draw) -> Example:
    rows = d.dim("vocab")
    weight = Weight(Type("f32", (rows, d.dim("width"))))
    return Example("embedding", [d.below(rows.size or 0, BATCH, SEQ)], {"w.weight": weight})


def _rms_norm(d: Draw) -> Example:
    width = d.dim("width")
    weight = Weight(Type("f32", (width,)))
    return Example("rms_norm", [d.tokens(width)], {"w.weight": weight}, {"eps": 1e-6})


def _parameter(d: Draw) -> Example:
    return Example("parameter", [], {"w.scale": Weight(Type("f32", (d.dim("a"), d.dim("b"))))})


def _layer_norm(d: Draw) -> Example:
    width = d.dim("width", 2)
    weights = {f"w.{name}": Weight(Type("f32", (width,))) for name in d.choice("w", "wb")}
    return Example("layer_norm", [d.tokens(width)], weights, {"eps": 1e-3})


def _of_one(kind: str, **attrs: Attr) -> Callable[[Draw], Example]:
    return lambda d: Example(kind, [d.tokens(d.dim("width"))], attrs=attrs)


def _positive(kind: str) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        type, x = d.tokens(d.dim("width"))
        return Example(kind, [(type, x.abs() + 0.1)])

    return example


def _away_from_zero(kind: str, **attrs: Attr) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        type, x = d.tokens(d.dim("width"))
        return Example(kind, [(type, x.sign() * (x.abs() + 0.5) + (x == 0))], attrs=attrs)

    return example


def _of_two(kind: str) -> Callable[[Draw], Example]:
    """Equal shapes, scalars, and others that are broadcast, before or behind the tensor."""

    def example(d: Draw) -> Example:
        heads, width, one = d.dim("heads", 2), d.dim("width", 2), Dim("one", 1)
        whole = (BATCH, SEQ, heads, width)
        small = d.choice((), whole, (width,), (BATCH, SEQ, heads, one), (one, width), (one,))
        first_one, last_one = (BATCH, SEQ, one, width), (heads, one)
        x, y = d.choice((whole, small), (small, whole), (first_one, last_one), ((), ()))
        first, (type, second) = d.floats(*x), d.floats(*y)
        if kind == "div":  # away from the pole
            second = second.sign() * (second.abs() + 0.5) + (second == 0)
        return Example(kind, [first, (type, second)])

    return example


def _rotate(kind: str) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        pairs = d.dim("pair", 1, 4)
        heads = d.choice((), (d.dim("heads"),))
        x = d.tokens(*heads, Dim("dim", 2 * (pairs.size or 0)))
        return Example(kind, [x, d.tokens(pairs), d.tokens(pairs)], fixed=(1, 2))

    return example


def _attention(d: Draw) -> Example:
    kv_heads, k, v = d.dim("kv_heads", 1, 3), d.dim("k"), d.dim("v")
    heads = d.choice(kv_heads, Dim("heads", 2 * (kv_heads.size or 0)))
    operands = [d.tokens(heads, k), d.tokens(kv_heads, k), d.tokens(kv_heads, v)]
    attrs = _scores(d)
    also = _also(d, heads, not attrs.keys() & {"window", "mask"})
    if also:
        attrs["also"] = tuple(also)
    return Example("attention", [*operands, *also.values()], attrs=attrs)


def _also(d: Draw, heads: Dim, select: bool) -> dict[str, tuple[Type, Tensor]]:
    """Each query selects itself and a key before it, which may be itself; or none, -1."""
    found = {}
    if select and d.choice(False, True):
        own = torch.arange(d.seq).expand(d.batch, d.seq)
        other = (torch.rand(own.shape, generator=d.generator) * (own + 2)).long() - 1
        type = Type("i64", (BATCH, SEQ, Dim("n", 2)))
        found["selected"] = type, torch.stack([other, own], -1)
    if d.choice(False, True):
        found["sinks"] = d.floats(heads)
    return found


def _indexer_loss(d: Draw) -> Example:
    attention, heads = _attention(d), Dim("index_heads", d.size(1, 3))
    q, k = attention.operands[:2]
    index = [d.tokens(heads, Dim("i", 3)), d.tokens(Dim("i", 3)), d.tokens(heads)]
    own = torch.arange(d.seq).expand(d.batch, d.seq)
    selected = Type("i64", (BATCH, SEQ, Dim("n", 2))), torch.stack([own, (own - 2).clamp(-1)], -1)
    operands = [q, k, *index, selected]
    return Example("indexer_loss", operands, attrs={"scale": 0.5}, fixed=(0, 1))


def _scores(d: Draw) -> dict[str, Attr]:
    attrs: dict[str, Attr] = {"scale": d.choice(0.5, 1.5)}
    if d.choice(False, True):
        attrs["window"] = d.size(1, 7)
    if d.choice(False, True):
        attrs["mask"] = d.choice("(q - k) % 2 == 0", "q // 2 == k // 2 or k < 1")
    if d.choice(False, True):
        attrs["softcap"] = d.choice(0.5, 30.0)
    return attrs


def _document_attention(d: Draw) -> Example:
    """Documents of random lengths, the first one cut anywhere."""
    plain = _attention(d)
    position = torch.zeros(d.batch, d.seq, dtype=torch.int64)
    for row in position:
        for i in range(d.seq):
            row[i] = 0 if d.choice(True, False, False) else row[i - 1] + 1 if i else d.size()
    operands = [*plain.operands[:3], (Type("i64", (BATCH, SEQ)), position), *plain.operands[3:]]
    return Example("document_attention", operands, attrs=plain.attrs)


def _topk_groups(d: Draw) -> Example:
    groups, each = d.size(1, 4), d.size(2, 4)
    experts = Dim("experts", groups * each)
    kept = d.size(1, groups)
    type, score = d.tokens(experts)
    bias = {"bias": Weight(Type("f32", (experts,)), trainable=False)}
    return Example(
        "topk_groups",
        [(type, score.abs())],
        d.choice({}, bias),
        {
            "k": dims_attr(Dim("k", d.size(1, min(kept * each, 4)))),
            "n_group": groups,
            "topk_group": kept,
            "group_score": d.choice("top2_sum", "max"),
            "normalize": d.choice(True, False),
            "scale": d.choice(1.0, 2.5),
        },
    )


def _gate(kind: str) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        chosen = _topk_groups(d)
        attrs = {"scoring": d.choice("sigmoid", "softmax"), **chosen.attrs}
        return Example(kind, chosen.operands, chosen.weights, attrs)

    return example


def _permute(d: Draw) -> Example:
    experts = d.size(1, 20)
    route = d.route(experts, d.size(1, min(experts, 4)))
    count = dims_attr(Dim("experts", experts))
    return Example("permute", [d.tokens(d.dim("width")), route], attrs={"count": count})


def _identity_weight(d: Draw) -> Example:
    experts = d.size(2, 20)
    route = d.route(experts, d.size(1, min(experts, 4)))
    weight = d.tokens(route[0].last)
    return Example("identity_weight", [route, weight], attrs={"count": d.size(1, experts)})


def _slots(d: Draw, width: Dim) -> tuple[Dim, Dim, tuple[Type, Tensor], list[Tensor]]:
    """Experts, choices, slots [slot, width] as `permute` gives them, and its other results."""
    experts = d.dim("experts", 1, 20)
    k = Dim("k", d.size(1, min(experts.size or 0, 4)))
    _, route = d.route(experts.size or 0, k.size or 0)
    rows, *rest = F.permute(d.tokens(width)[1], route, experts.size or 0)
    return experts, k, (Type("f32", (SLOT, width)), rows), rest


def _grouped_linear(d: Draw) -> Example:
    width = d.dim("in")
    experts, _, rows, (ends, _) = _slots(d, width)
    outs = [d.dim(f"out{i}") for i in range(d.size(1, _most_weights("grouped_linear")))]
    weights = {
        f"experts.*.w{i}.weight": Weight(Type("f32", (out, width)), stack=experts.size or 0)
        for i, out in enumerate(outs)
    }
    return Example("grouped_linear", [rows, (Type("i32", (experts,)), ends)], weights)


def _grouped_parameter(d: Draw) -> Example:
    experts, _, rows, (ends, _) = _slots(d, d.dim("in"))
    weight = Weight(Type("f32", (d.dim("out"),)), stack=experts.size or 0)
    return Example("grouped_parameter", [rows, (Type("i32", (experts,)), ends)], {"e.*.b": weight})


def _unpermute(d: Draw) -> Example:
    _, k, rows, (_, order) = _slots(d, d.dim("width"))
    return Example("unpermute", [rows, (Type("i64", (SLOT,)), order), d.tokens(k)])


def _sequence_balance_loss(d: Draw) -> Example:
    experts = d.dim("experts")
    type, score = d.tokens(experts)
    # Positive, as the gate gives them: nothing is divided by a sum of zero.
    return Example(
        "sequence_balance_loss",
        [(type, score.abs() + 0.1)],
        attrs={"k": d.size(1, experts.size or 0)},
    )


def _cross_entropy(d: Draw) -> Example:
    vocab = d.dim("vocab")
    return Example("cross_entropy", [d.tokens(vocab), d.labels(vocab.size or 0)])


def _linear_cross_entropy(d: Draw) -> Example:
    vocab, width = d.dim("vocab"), d.dim("width")
    weight = Weight(Type("f32", (vocab, width)))
    operands = [d.tokens(width), d.labels(vocab.size or 0)]

    def plain(x: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head), labels)

    return Example("linear_cross_entropy", operands, {"head.weight": weight}, plain=plain)


def _split(d: Draw) -> Example:
    parts = [d.dim(f"part{i}") for i in range(d.size(1, 3))]
    whole = Dim("whole", sum(p.size or 0 for p in parts))
    return Example("split", [d.tokens(whole)], attrs={"into": dims_attr(*parts)})


def _concat(d: Draw) -> Example:
    parts = [d.dim(f"part{i}") for i in range(d.size(1, 3))]
    whole = Dim("whole", sum(p.size or 0 for p in parts))
    return Example("concat", [d.tokens(p) for p in parts], attrs={"into": dims_attr(whole)})


def _flatten(d: Draw) -> Example:
    dims = (d.dim("a"), d.dim("b"))
    return Example("flatten", [d.tokens(*dims)], attrs={"dims": dims_attr(*dims)})


def _unflatten(d: Draw) -> Example:
    dims = (d.dim("a"), d.dim("b"))
    name = d.choice("a*b", "both")
    whole = Dim(name, (dims[0].size or 0) * (dims[1].size or 0))
    return Example("unflatten", [d.tokens(whole)], attrs={"dims": dims_attr(*dims)})


def _broadcast(d: Draw) -> Example:
    return Example(
        "broadcast", [d.tokens(d.dim("width"))], attrs={"dim": dims_attr(d.dim("heads"))}
    )


def _drop(kind: str) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        attrs: dict[str, Attr] = {"dim": "seq", "count": d.size(1, d.seq)}
        return Example(kind, [d.tokens(d.dim("width"))], attrs=attrs)

    return example


def _of_equals(kind: str) -> Callable[[Draw], Example]:
    def example(d: Draw) -> Example:
        width = d.dim("width")
        return Example(kind, [d.tokens(width), d.tokens(width)])

    return example


def _add_rms_norm(d: Draw) -> Example:
    width = d.dim("width")
    weight = Weight(Type("f32", (width,)))
    operands = [d.tokens(width), d.tokens(width)]
    return Example("add_rms_norm", operands, {"w.weight": weight}, {"eps": 1e-6})


def _extern(d: Draw) -> Example:
    width = d.dim("width", 2)
    shorter = Dim("shorter", (width.size or 0) - 1)
    attrs: dict[str, Attr] = {
        "name": "weigh",
        "function": "user.weigh",
        "gradient": d.choice("", "user.weigh_grad"),
        "numbers": ("limit", 2.0),
        "takes": ("f32[.., width]", "f32[.., shorter]"),
        "gives": ("f32[.., shorter]", "i64[..]"),
        "flops": "0",
    }
    return Example("extern", [d.tokens(width), d.tokens(shorter)], attrs=attrs)


def _sequence_extern(d: Draw) -> Example:
    heads, dim = d.dim("heads", most=3), Dim("dim", 4)
    takes = ("f32[batch, seq, heads, dim]", *2 * ("f32[batch, context, heads, dim]",))
    attrs: dict[str, Attr] = {
        "name": "twice",
        "function": "user.differential",
        "gradient": "",
        "numbers": ("subtracted", 0.3),
        "takes": takes,
        "gives": takes[:1],
        "flops": "0",
    }
    return Example("sequence_extern", [d.tokens(heads, dim) for _ in takes], attrs=attrs)


EXAMPLES: dict[str, Callable[[Draw], Example]] = {
    "embedding": _embedding,
    "linear": _linear,
    "parameter": _parameter,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _of_equals("swiglu"),
    **{f.kind: _of_one(f.kind) for f in POINTWISE},
    "log": _positive("log"),
    "sqrt": _positive("sqrt"),
    "softmax": _of_one("softmax"),
    "rotate": _rotate("rotate"),
    "rotate_halves": _rotate("rotate_halves"),
    "indexer_loss": _indexer_loss,
    "attention": _attention,
    "document_attention": _document_attention,
    "topk_groups": _topk_groups,
    "gate": _gate("gate"),
    "gate_saving": _gate("gate_saving"),
    "identity_weight": _identity_weight,
    "permute": _permute,
    "grouped_linear": _grouped_linear,
    "grouped_parameter": _grouped_parameter,
    "unpermute": _unpermute,
    "sequence_balance_loss": _sequence_balance_loss,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "add": _of_two("add"),
    "sub": _of_two("sub"),
    "mul": _of_two("mul"),
    "div": _of_two("div"),
    "scale": _of_one("scale", by=-2.5),
    "shift": lambda d: _of_one("shift", by=d.choice(1.0, -2.5), negated=d.choice(True, False))(d),
    "reciprocal": _away_from_zero("reciprocal", by=-1.5),
    "cast": _of_one("cast", dtype="bf16"),
    "sum": _of_one("sum"),
    "split": _split,
    "concat": _concat,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "broadcast": _broadcast,
    "drop_first": _drop("drop_first"),
    "drop_last": _drop("drop_last"),
    "extern": _extern,
    "sequence_extern": _sequence_extern,
}


SAVING = ("attention_saving", "document_attention_saving")


def test_every_derivative_is_tested() -> None:
    derived = {kind for kind, operator in OPS.items() if "grad" in _declared(operator)}
    # A constant has no operands, and what attention saves is a matter of that operator; those
    # that need several ranks are in tests/compiler/passes/test_partition.py.
    assert set(EXAMPLES) == derived - {"constant", *SAVING, "dispatch", "combine"}


def _declared(operator: type[Operator]) -> set[str]:
    """What a class and its bases declare beyond `Operator`."""
    bases = [base for base in operator.__mro__ if base not in Operator.__mro__]
    return {name for base in bases for name in vars(base)}


# ---- both derivatives ------------------------------------------------------------------------


class Adjoint:
    """Collects a derivative at the end of a graph; everything is wanted."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        *,
        names: Sequence[str] = (),
        **attrs: Attr,
    ) -> list[Value]:
        return self.builder.add(kind, operands, symbols, names=names, regions=(), spans=(), **attrs)

    def weight(self, symbol: str) -> Type:
        return self.builder.graph.weights[symbol].type

    def needs_grad(self, value: Value) -> bool:
        return value.type.dtype in FLOATS

    def trainable(self, symbols: Sequence[str]) -> bool:
        return any(self.builder.graph.weights[s].trainable for s in symbols)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_derivatives_are_those_of_autograd(kind: str, data: st.DataObject) -> None:
    example, operator = EXAMPLES[kind](Draw(data.draw)), OPS[kind]
    inputs = {f"x{i}": tensor for i, (_, tensor) in enumerate(example.operands)}
    for i, tensor in enumerate(inputs.values()):
        tensor.requires_grad_(tensor.is_floating_point() and i not in example.fixed)
    program = _program(kind, example)
    weights = random_weights(program, dtype=torch.float64)
    for name, tensor in weights.items():
        tensor.requires_grad_(name != "bias")  # it only selects
    if example.plain is None:
        out = run(program, inputs, weights, dtype=torch.float64)
    else:
        out = [example.plain(*inputs.values(), *weights.values())]
    places = [i for i, t in enumerate(out) if t.requires_grad]
    chosen = sorted(data.draw(st.sets(st.sampled_from(places), min_size=1), label="results"))
    seeds = {i: torch.randn_like(out[i]) for i in chosen}
    leaves = {name: t for name, t in [*inputs.items(), *weights.items()] if t.requires_grad}
    expected = torch.autograd.grad(
        [out[i] for i in seeds], [*leaves.values()], [*seeds.values()], allow_unused=True
    )

    # The derivative as operators, behind the operator itself.
    program = _program(operator.saving[0] if operator.saving else kind, example)
    graph, op = program.main, program.main.ops[0]
    d: list[Value | None] = [
        Value(f"d{i}", v.type) if i in seeds else None for i, v in enumerate(op.results)
    ]
    graph.args += [v for v in d if v]
    graph.ops.pop()
    found = operator.grad(Adjoint(Builder(graph, program.graphs)), op, d)
    assert len(found) == len(op.operands)
    graph.ops.append(Op("return", [v for v in found if v]))
    state = State()
    given = inputs | {f"d{i}": seed for i, seed in seeds.items()}
    with torch.no_grad():
        made = iter(run(program, given, weights, state=state, dtype=torch.float64))
    gradients = {f"x{i}": next(made) for i, v in enumerate(found) if v} | state.grads
    assert gradients.keys() <= leaves.keys()
    for name, want in zip(leaves, expected, strict=True):
        close(gradients.get(name), want, name)


def _program(kind: str, example: Example) -> Program:
    """A graph of one operator, with all of its results."""
    graph = Graph("One", [Value(f"x{i}", type) for i, (type, _) in enumerate(example.operands)])
    graph.weights = dict(example.weights)
    program = Program("one", "One", {"One": graph})
    Builder(graph, program.graphs).add(
        kind, graph.args, tuple(example.weights), regions=(), **example.attrs
    )
    graph.ops.append(Op("return", list(graph.ops[0].results)))
    return program


def close(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Within 1e-9 of the largest; what autograd has no gradient for may be zeros."""
    if found is None or expected is None:
        rest = found if expected is None else expected
        assert rest is None or not rest.abs().sum(), what
        return
    assert found.shape == expected.shape, what
    if found.numel():
        # Where all terms cancel, rounding is all there is; values and seeds are about 1.
        largest = max(expected.abs().max().item(), 1e-5)
        error = (found - expected).abs().max().item()
        assert error <= 1e-9 * largest, f"{what}: {found} is not {expected}"
