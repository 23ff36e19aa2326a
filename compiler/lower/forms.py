"""The functions that equations of a block are written with, and the operators they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from compiler.graph.core import Value
from compiler.graph.types import Dim
from compiler.lower.bind import BlockRef
from compiler.lower.scope import Scope
from compiler.ops.attention import ALSO, DocumentAttention
from compiler.ops.base import Operator, Site, TypeMismatch, dims_attr
from compiler.ops.pointwise import POINTWISE


class Kind(Enum):
    """What an argument given by name may be, in the words of messages."""

    NUMBER = "a number"
    INT = "a whole number"
    DIM = "a dimension"
    TEXT = "quoted text"
    FLAG = "true or false"
    PATH = "the name of a weight"
    AXIS = "the name of a dimension"
    BLOCK = "a block"
    MASK = "a condition over the positions q and k"
    TENSOR = "a tensor"


@dataclass(frozen=True)
class Given:
    """Checked arguments of a use."""

    tensors: list[Value]
    dims: list[Dim]
    keywords: dict[str, Any]
    tensor_names: list[str]

    def dim(self, name: str) -> Dim:
        value = self.keywords[name]
        assert isinstance(value, Dim)
        return value


Make = Callable[[Scope, Given], list[Value]]


@dataclass(frozen=True)
class Form:
    """One function of the block language.

    `tensors` None takes any number, and a name that ends in "?" may be left out; `dims` follow
    them.
    """

    about: str
    tensors: tuple[str, ...] | None
    make: Make
    required: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, tuple[Kind, Any]] = field(default_factory=dict)
    dims: bool = False

    @property
    def signature(self) -> str:
        parts = list(self.tensors) if self.tensors is not None else [".."]
        parts += ["dim, .."] if self.dims else []
        parts += [f"{name} = {kind.name.lower()}" for name, kind in self.required.items()]
        for name, (kind, default) in self.optional.items():
            told = "none" if default is None else default
            parts.append(f"{name} = {str(told).lower() if kind is Kind.FLAG else told}")
        return ", ".join(parts)


def _simple(kind: str) -> Make:
    def make(frame: Scope, given: Given) -> list[Value]:
        return frame.op(kind, given.tensors, **given.keywords)

    return make


def _linear(frame: Scope, given: Given) -> list[Value]:
    (x,) = given.tensors
    path: str = given.keywords["name"]
    expected = given.keywords["from"]
    if x.type.dims and expected is not None and expected != x.type.last:
        layer = path.rsplit(".", 1)[-1]
        raise TypeMismatch(f"{layer} expects {expected.words}, got {x.type.last.words}", 0)
    if not x.type.dims:
        raise TypeMismatch("linear needs at least 1 dimension, got a scalar", 0)
    layer, to = path.rsplit(".", 1)[-1], given.dim("to")
    weight = frame.weight(f"{path}.weight", (to, x.type.last))
    y = frame.op("linear", [x], [weight], wish=layer)
    if given.keywords["bias"]:
        bias = _parameter_of(frame, frame.weight(f"{path}.bias", (to,), init="zeros"), x.type.dtype)
        return frame.op("add", [*y, bias], wish=layer)
    return y


def _parameter_of(frame: Scope, weight: str, dtype: str | None = None) -> Value:
    """A weight as a tensor, in another element type where it is to meet one."""
    wish = weight.replace(".", "_")
    (value,) = frame.op("parameter", [], [weight], wish=wish)
    if dtype not in (None, value.type.dtype):
        (value,) = frame.op("cast", [value], wish=wish, dtype=dtype)
    return value


def _parameter(frame: Scope, given: Given) -> list[Value]:
    """Ones and zeros are said as such, as the weights of norms are. It is a scale, a bias or the
    like, which weight decay would pull to 0, unless the block says that it is a matrix."""
    decay = given.keywords["decay"]
    if decay and len(given.dims) < 2:
        raise TypeMismatch(
            f"weight decay is for matrices, and this parameter is [{given.dims[0].words}]",
            help="leave `decay` out: vectors do not decay",
        )
    start, std = float(given.keywords["init"]), float(given.keywords["std"])
    if std < 0:
        raise TypeMismatch(f"a standard deviation is at least 0, not {std:g}")
    known = {0.0: "zeros", 1.0: "ones"}.get(start) if not std else None
    how: dict[str, Any] = {"init": known} if known else {"std": std, "value": start}
    how["decay"] = decay
    return [_parameter_of(frame, frame.weight(given.keywords["name"], tuple(given.dims), **how))]


def _layer_norm(frame: Scope, given: Given) -> list[Value]:
    path: str = given.keywords["name"]
    (x,) = given.tensors
    if not x.type.dims:
        raise TypeMismatch("layer_norm needs at least 1 dimension, got a scalar", 0)
    weights = [frame.weight(f"{path}.weight", (x.type.last,), init="ones")]
    if given.keywords["bias"]:
        weights.append(frame.weight(f"{path}.bias", (x.type.last,), init="zeros"))
    wish, eps = path.replace(".", "_"), float(given.keywords["eps"])
    return frame.op("layer_norm", [x], weights, wish=wish, eps=eps)


def _embedding(frame: Scope, given: Given) -> list[Value]:
    dims = (given.dim("rows"), given.dim("to"))
    weight = frame.weight(f"{given.keywords['name']}.weight", dims)
    return frame.op("embedding", given.tensors, [weight])


def _rms_norm(frame: Scope, given: Given) -> list[Value]:
    path: str = given.keywords["name"]
    (x,) = given.tensors
    if not x.type.dims:
        raise TypeMismatch("rms_norm needs at least 1 dimension, got a scalar", 0)
    weight = frame.weight(f"{path}.weight", (x.type.last,), init="ones")
    wish = path.replace(".", "_")
    return frame.op("rms_norm", [x], [weight], wish=wish, eps=float(given.keywords["eps"]))


def _rope_table(frame: Scope, given: Given) -> list[Value]:
    numbers = given.keywords
    return frame.op(
        "rope_table",
        given.tensors,
        dim=numbers["dim"],
        theta=float(numbers["theta"]),
        factor=float(numbers["factor"]),
        original_max_position_embeddings=numbers["original_max_position_embeddings"],
        beta_fast=float(numbers["beta_fast"]),
        beta_slow=float(numbers["beta_slow"]),
        attention_factor=float(numbers["attention_factor"]),
    )


def _attention(frame: Scope, given: Given) -> list[Value]:
    """`position` counts where the spec has a mask between documents, and is checked anywhere."""
    scores: dict[str, Any] = {"scale": float(given.keywords["scale"])}
    for name, kind in (("window", int), ("mask", str), ("softcap", float)):
        if given.keywords[name] is not None:
            scores[name] = kind(given.keywords[name])
    also = [given.keywords[name] for name in ALSO if given.keywords[name] is not None]
    if also:
        scores["also"] = tuple(name for name in ALSO if given.keywords[name] is not None)
    told = len(given.tensors) == len(DocumentAttention.operands)
    if told:
        types = tuple(v.type for v in [*given.tensors, *also])
        DocumentAttention.infer(Site(types, attrs=scores))
    if not frame.low.description.spec.train.document_mask:
        return frame.op("attention", [*given.tensors[:3], *also], **scores)
    if not told:
        raise TypeMismatch(
            "train.document_mask is true, and this attention has no positions to tell documents by",
            help="give it the positions of its tokens: `attention(q, k, v, position, scale = ..)`",
        )
    return frame.op("document_attention", [*given.tensors, *also], **scores)


def _lightning_indexer(frame: Scope, given: Given) -> list[Value]:
    if frame.low.description.spec.train.document_mask:
        raise TypeMismatch(
            "train.document_mask is true, and an indexer would select keys of other documents",
            help="train without it, or select by an extern that takes positions",
        )
    return frame.op("lightning_indexer", given.tensors, topk=dims_attr(given.dim("topk")))


def _indexer_loss(frame: Scope, given: Given) -> list[Value]:
    return frame.op("indexer_loss", given.tensors, scale=float(given.keywords["scale"]))


def _topk_groups(frame: Scope, given: Given) -> list[Value]:
    numbers = dict(given.keywords)
    symbols = []
    if numbers["bias"] is not None:
        dims = (given.tensors[0].type.last,)
        symbols.append(
            frame.weight(numbers["bias"], dims, init="zeros", dtype="f32", trainable=False)
        )
    if numbers["group_score"] not in ("top2_sum", "max"):
        raise TypeMismatch(f"group_score is top2_sum or max, not {numbers['group_score']}")
    return frame.op(
        "topk_groups",
        given.tensors,
        symbols,
        k=dims_attr(given.dim("k")),
        n_group=numbers["n_group"],
        topk_group=numbers["topk_group"],
        group_score=numbers["group_score"],
        normalize=numbers["normalize"],
        scale=float(numbers["scale"]),
    )


def _experts(frame: Scope, given: Given) -> list[Value]:
    """Experts that compute nothing have no rows: they add the token, times their weights."""
    ref: BlockRef = given.keywords["expert"]
    name, count, identity = (given.keywords[n] for n in ("name", "count", "identity"))
    if identity < 0:
        raise TypeMismatch(f"identity ({identity}) is negative", help="0: every expert computes")
    x, topk_indices, weight = given.tensors
    _need_all_chosen(frame, topk_indices, count, identity)
    if not identity:
        return frame.experts(given.tensors, count, ref, name)
    (y,) = frame.experts(given.tensors, count, ref, name, identity=identity)
    kind = "identity_weight"
    (share,) = frame.op(kind, [topk_indices, weight], wish=kind, count=count.size or 1)
    if share.type.dtype != x.type.dtype:
        (share,) = frame.op("cast", [share], wish=kind, dtype=x.type.dtype)
    (itself,) = frame.op("mul", [x, share], wish="itself")
    return frame.op("add", [y, itself])


def _need_all_chosen(frame: Scope, topk_indices: Value, count: Dim, identity: int) -> None:
    """Raises `TypeMismatch` where a router chooses among more or fewer experts than there are."""
    for op in frame.builder.ops:
        if topk_indices in op.results and op.kind == "topk_groups":
            among, there = op.operands[0].type.last, (count.size or 0) + identity
            if among.size != there:
                raise TypeMismatch(
                    f"the router chooses among {among.words}, and there are {there} experts",
                    1,
                    "experts that compute are `count`, those that compute nothing `identity`",
                )


def _expert_load(frame: Scope, given: Given) -> list[Value]:
    return frame.op("expert_load", given.tensors, count=dims_attr(given.dim("count")))


def _cache(frame: Scope, given: Given) -> list[Value]:
    entries = tuple(given.tensor_names)
    known = [op.attrs["entries"] for op in frame.builder.ops if op.kind == "cache_entry"]
    kept = [n for names in known for n in entries if isinstance(names, tuple) and n in names]
    if kept or len(set(entries)) < len(entries):
        raise TypeMismatch(
            f"a block remembers {', '.join(kept or entries)} twice",
            help="assign each tensor to a name of its own first: caches go by these names",
        )
    return frame.op("cache_entry", given.tensors, entries=entries)


def _split(frame: Scope, given: Given) -> list[Value]:
    return frame.op("split", given.tensors, into=dims_attr(*given.dims))


def _concat(frame: Scope, given: Given) -> list[Value]:
    return frame.op("concat", given.tensors, into=dims_attr(given.dim("into")))


def _layout(kind: str) -> Make:
    def make(frame: Scope, given: Given) -> list[Value]:
        return frame.op(kind, given.tensors, dims=dims_attr(*given.dims))

    return make


def _broadcast(frame: Scope, given: Given) -> list[Value]:
    if len(given.dims) != 1:
        raise TypeMismatch("broadcast adds one dimension")
    return frame.op("broadcast", given.tensors, dim=dims_attr(*given.dims))


def _drop(kind: str) -> Make:
    def make(frame: Scope, given: Given) -> list[Value]:
        along, count = given.keywords["along"], given.keywords["count"]
        return frame.op(kind, given.tensors, dim=along, count=count)

    return make


def _cast(dtype: str | None) -> Make:
    def make(frame: Scope, given: Given) -> list[Value]:
        to = dtype or frame.dtype
        (x,) = given.tensors
        return [x] if x.type.dtype == to else frame.op("cast", [x], dtype=to)

    return make


def _about(operator: type[Operator]) -> str:
    return (operator.__doc__ or "").removesuffix(".")


FORMS: dict[str, Form] = {
    "linear": Form(
        "x W^T, weight `name`.weight [to, from]; plus `name`.bias [to] where `bias`",
        ("x",),
        _linear,
        {"to": Kind.DIM, "name": Kind.PATH},
        {"from": (Kind.DIM, None), "bias": (Kind.FLAG, False)},
    ),
    "embedding": Form(
        "row `tokens` of the table `name`.weight [rows, to]",
        ("tokens",),
        _embedding,
        {"rows": Kind.DIM, "to": Kind.DIM, "name": Kind.PATH},
    ),
    "rms_norm": Form(
        "root-mean-square norm over the last dimension, weight `name`.weight",
        ("x",),
        _rms_norm,
        {"name": Kind.PATH},
        {"eps": (Kind.NUMBER, 1e-6)},
    ),
    "layer_norm": Form(
        "norm by mean and variance over the last dimension, weights `name`.weight and `name`.bias",
        ("x",),
        _layer_norm,
        {"name": Kind.PATH},
        {"eps": (Kind.NUMBER, 1e-5), "bias": (Kind.FLAG, True)},
    ),
    "parameter": Form(
        "a weight of its own, which starts as normal numbers of mean `init`, deviation `std`",
        (),
        _parameter,
        {"init": Kind.NUMBER, "name": Kind.PATH},
        {"std": (Kind.NUMBER, 0), "decay": (Kind.FLAG, False)},
        dims=True,
    ),
    **{f.kind: Form(_about(f), ("x",), _simple(f.kind)) for f in POINTWISE},
    "softmax": Form("softmax over the last dimension", ("x",), _simple("softmax")),
    "sum": Form("sum of all elements", ("x",), _simple("sum")),
    "float32": Form("x in float32", ("x",), _cast("f32")),
    "cast": Form("x in the model's element type", ("x",), _cast(None)),
    "detach": Form("x, which no gradient reaches from here", ("x",), _simple("detach")),
    "split": Form("the last dimension cut into parts", ("x",), _split, dims=True),
    "concat": Form("joined along the last dimension", ("x", "y"), _concat, {"into": Kind.DIM}),
    "flatten": Form("the last dimensions made one", ("x",), _layout("flatten"), dims=True),
    "unflatten": Form("the last dimension made several", ("x",), _layout("unflatten"), dims=True),
    "broadcast": Form(
        "a new dimension before the last, with equal entries", ("x",), _broadcast, dims=True
    ),
    "drop_first": Form(
        "without the first entries along a run-time dimension",
        ("x",),
        _drop("drop_first"),
        {"along": Kind.AXIS, "count": Kind.INT},
    ),
    "drop_last": Form(
        "without the last entries along a run-time dimension",
        ("x",),
        _drop("drop_last"),
        {"along": Kind.AXIS, "count": Kind.INT},
    ),
    "rope_table": Form(
        "cos and sin of rotary embedding, with YaRN when factor > 1",
        ("position",),
        _rope_table,
        {"dim": Kind.INT, "theta": Kind.NUMBER},
        {
            "factor": (Kind.NUMBER, 1),
            "original_max_position_embeddings": (Kind.INT, 4096),
            "beta_fast": (Kind.NUMBER, 32),
            "beta_slow": (Kind.NUMBER, 1),
            "attention_factor": (Kind.NUMBER, 1),
        },
    ),
    "rotate": Form("rotary embedding of pairs (2i, 2i+1)", ("x", "cos", "sin"), _simple("rotate")),
    "rotate_halves": Form(
        "rotary embedding of pairs (i, i + n / 2)", ("x", "cos", "sin"), _simple("rotate_halves")
    ),
    "cache": Form("marks what a decoder has to remember", None, _cache),
    "attention": Form(
        "causal softmax(scale q k^T) v, within documents if the spec has `train.document_mask`",
        ("q", "k", "v", "position?"),
        _attention,
        {"scale": Kind.NUMBER},
        {
            "window": (Kind.INT, None),
            "mask": (Kind.MASK, None),
            "softcap": (Kind.NUMBER, None),
            "selected": (Kind.TENSOR, None),
            "sinks": (Kind.TENSOR, None),
        },
    ),
    "lightning_indexer": Form(
        "the `topk` keys of highest index score for each query; -1 where there are fewer",
        ("q", "k", "weight"),
        _lightning_indexer,
        {"topk": Kind.DIM},
    ),
    "indexer_loss": Form(
        "how far index scores are from attention to the selected keys, which is the teacher",
        ("q", "k", "index_q", "index_k", "weight", "selected"),
        _indexer_loss,
        {"scale": Kind.NUMBER},
    ),
    "topk_groups": Form(
        "the k best experts of the best groups, and their weights",
        ("score",),
        _topk_groups,
        {
            "k": Kind.DIM,
            "n_group": Kind.INT,
            "topk_group": Kind.INT,
            "group_score": Kind.TEXT,
            "normalize": Kind.FLAG,
            "scale": Kind.NUMBER,
        },
        {"bias": (Kind.PATH, None)},
    ),
    "experts": Form(
        "each token through the experts chosen for it, weighted and summed",
        ("x", "topk_indices", "weight"),
        _experts,
        {"count": Kind.DIM, "expert": Kind.BLOCK, "name": Kind.PATH},
        {"identity": (Kind.INT, 0)},
    ),
    "sequence_balance_loss": Form(
        "balance loss of each sequence, before its weight alpha",
        ("score",),
        _simple("sequence_balance_loss"),
        {"k": Kind.INT},
    ),
    "expert_load": Form(
        "tokens for each expert", ("topk_indices",), _expert_load, {"count": Kind.DIM}
    ),
    "cross_entropy": Form(
        "sum of -log p(label); -100 is left out", ("logits", "labels"), _simple("cross_entropy")
    ),
    "count_labels": Form("number of labels other than -100", ("labels",), _simple("count_labels")),
}
