"""Derivatives that are operators of their own: what `Operator.grad` of the others is made of.

Their first operand is the gradient of a result; they give gradients of operands. Each is defined
by the derivative of the operator whose name it bears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from compiler.graph.core import Attr
from compiler.graph.types import Dim, Type
from compiler.ops.attention import (
    SCORES,
    Attention,
    DocumentAttention,
    IndexerLoss,
    also_types,
    index_flops,
    need_scores,
    seen_pairs,
)
from compiler.ops.base import Operator, Site, Sums, TypeMismatch, dims_of, same_shape
from compiler.ops.moe import Gate
from compiler.ops.pointwise import POINTWISE, Pointwise


class LinearInputGrad(Operator):
    """dx = dy W for y = x W^T; weights [out, in], several below one another."""

    kind = "linear_input_grad"
    sums: ClassVar[Sums] = "all"
    operands: ClassVar[tuple[str, ...]] = ("dy",)
    symbols = ("weight*",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        dy = site.types[0]
        _meets(cls.kind, dy, site.weights)
        return (dy.with_last(site.weights[0].last),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * (site.weights[0].last.size or 0)


class LinearWeightGrad(Operator):
    """dW = dy^T x, summed over all tokens, for y = x W^T."""

    kind = "linear_weight_grad"
    weight_product = True
    operands: ClassVar[tuple[str, ...]] = ("dy", "x")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        dy, x, *offs = site.types
        if dy.dims[:-1] != x.dims[:-1]:
            raise TypeMismatch(f"{cls.kind}: {dy.words} is not about the rows of {x.words}", 0)
        return (Type(dy.dtype, (*(dim for o in offs for dim in o.dims), dy.last, x.last)),)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return 2 * site.types[0].count(sizes) * (site.types[1].last.size or 0)


class GroupedLinearInputGrad(LinearInputGrad):
    """dx = dy W_e for the slots of each expert e: dy [slot, out], offs [experts] -> [slot, in]."""

    kind = "grouped_linear_input_grad"
    sums = "first"
    operands = ("dy", "offs")


class GroupedLinearWeightGrad(LinearWeightGrad):
    """dW_e = dy^T x over the slots of each expert e.

    dy [slot, out], x [slot, in], offs [experts] -> [experts, out, in]; zeros for idle experts.
    """

    kind = "grouped_linear_weight_grad"
    operands = ("dy", "x", "offs")


class GroupedParameterGrad(Operator):
    """The sums of d [slot, n] over the slots of each expert: [experts, n]."""

    kind = "grouped_parameter_grad"
    operands = ("d", "offs")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d, offs = site.types
        return (Type(d.dtype, (*offs.dims, *d.dims[1:])),)


class EmbeddingGrad(Operator):
    """Gradient of the table: the rows of d [.., hidden_size] summed by token."""

    kind = "embedding_grad"
    operands = ("d", "tokens")
    attrs: ClassVar = {"rows": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d = site.types[0]
        return (Type(d.dtype, (*dims_of(site.attrs["rows"]), d.last)),)


class RMSNormGrad(Operator):
    """Gradients of `rms_norm`: of x [.., n] and of the weight [n], summed in float32."""

    kind = "rms_norm_grad"
    sums = "first"
    operands = ("d", "x")
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[1], site.weights[0]
        return (x, weight.with_dtype(x.dtype))


class LayerNormGrad(Operator):
    """Gradients of `layer_norm`: of x [.., n], of the weight and of the bias [n], in float32."""

    kind = "layer_norm_grad"
    sums = "first"
    operands = ("d", "x")
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[1], site.weights[0].with_dtype(site.types[1].dtype)
        return (x, weight, weight)


class AddRMSNormGrad(Operator):
    """Gradients of `add_rms_norm`: of either summand, `d_total` and that through the norm; and of
    the weight."""

    kind = "add_rms_norm_grad"
    operands = ("d_total", "d", "total")
    symbols = ("weight",)
    attrs: ClassVar = {"eps": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d_total, _, total = site.types
        same_shape(cls.kind, d_total, total)
        return (total, site.weights[0].with_dtype(total.dtype))


class _LikeSecond(Operator):
    """The gradient of the second operand, of whose type it is; linear in the first one."""

    operands: ClassVar[tuple[str, ...]] = ("d", "x")
    sums = "first"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[1],)


def _grad_of(function: type[Pointwise]) -> type[Operator]:
    """The operator `.._grad` of an elementwise function."""
    other = "y" if function.by_result else "x"
    members = {"kind": f"{function.kind}_grad", "operands": ("d", other)}
    return type(f"{function.__name__}Grad", (_LikeSecond,),
                {**members, "__doc__": function.derivative})  # fmt: skip


POINTWISE_GRADS = tuple(_grad_of(function) for function in POINTWISE)


class SwiGLUGrad(Operator):
    """Gradients of gate and up: those of `silu` and of the product."""

    kind = "swiglu_grad"
    operands = ("d", "gate", "up")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return site.types[1:]


class SoftmaxGrad(_LikeSecond):
    """y * (d - sum(d * y)), where y is the softmax; in float32."""

    kind = "softmax_grad"
    operands = ("d", "y")


class AttentionSaving(Attention):
    """`attention`, and the logarithm of each query's sum of exponentials: [batch, seq, heads]."""

    kind = "attention_saving"
    tiled_twice = True
    saving: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (o,) = super().infer(site)
        return (o, Type("f32", o.dims[:-1]))


class AttentionGrad(Operator):
    """Gradients of q, k and v, and of `sinks` where `also` names them, from what `attention_saving`
    gave; scores are made once more."""

    kind = "attention_grad"
    variadic = True
    operands: ClassVar[tuple[str, ...]] = ("d", "q", "k", "v", "o", "lse")
    attrs: ClassVar = SCORES

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        if len(site.types) < len(cls.operands):
            raise TypeMismatch(f"{cls.kind} takes {', '.join(cls.operands)}")
        need_scores(site, len(cls.operands), site.types[1])
        sinks = also_types(site).get("sinks")
        return (*site.types[1:4], *([sinks] if sinks is not None else []))

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        # Five products where the forward pass has two: scores, dp, dv, dq, dk.
        q, k, v = site.types[1:4]
        dim = 3 * (q.last.size or 0) + 2 * (v.last.size or 0)
        pairs = seen_pairs(site, sizes, q.dims[1], k.dims[1])
        return 2 * q.dims[0].at(sizes) * (q.dims[2].size or 0) * dim * pairs


class DocumentAttentionSaving(AttentionSaving, DocumentAttention):
    """`document_attention`, and what `attention_saving` gives besides."""

    kind = "document_attention_saving"


class DocumentAttentionGrad(AttentionGrad):
    """Gradients of q, k and v, from what `document_attention_saving` gave."""

    kind = "document_attention_grad"
    operands = ("d", "q", "k", "v", "position", "o", "lse")


class IndexerLossGrad(Operator):
    """Gradients of an indexer's queries, keys and weights, from that of `indexer_loss`."""

    kind = "indexer_loss_grad"
    sums = "first"
    operands = ("d", *IndexerLoss.operands)
    attrs: ClassVar = IndexerLoss.attrs

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return site.types[3:6]

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        # The scores once more, and two products for each of them.
        site = replace(site, types=site.types[1:])
        return IndexerLoss.flops(site, sizes) + 2 * index_flops(site.types[2:4], sizes)


class TopkGroupsGrad(Operator):
    """Gradient of the scores: of the chosen ones only, through the division by their sum.

    d and topk_indices [.., k], score [.., experts]. The bias has none: it selects.
    """

    kind = "topk_groups_grad"
    operands = ("d", "score", "topk_indices")
    attrs: ClassVar = {"normalize": bool, "scale": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[1],)


class IdentityWeightGrad(Operator):
    """Gradient of the weights: d [.., 1] where the index is `count` or above, 0 elsewhere.

    topk_indices [.., k].
    """

    kind = "identity_weight_grad"
    operands = ("d", "topk_indices")
    attrs: ClassVar = {"count": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d, topk_indices = site.types
        return (topk_indices.with_dtype(d.dtype),)


class GateSaving(Gate):
    """`gate`, and the affinities [.., experts]."""

    kind = "gate_saving"
    saving = ()

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (*super().infer(site), site.types[0])


class GateGrad(Operator):
    """Gradient of what the affinities are made of: through the weights, and through themselves.

    d and topk_indices [.., k], d_affinity and affinity [.., experts].
    """

    kind = "gate_grad"
    operands = ("d", "d_affinity", "affinity", "topk_indices")
    attrs: ClassVar = {"scoring": str, "normalize": bool, "scale": float}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[2],)


class PermuteGrad(Operator):
    """Gradient of the tokens: the sum over the slots that each was copied to.

    d [slot, hidden], sort_indices [slot], topk_indices [.., k] -> [.., hidden].
    """

    kind = "permute_grad"
    operands = ("d", "sort_indices", "topk_indices")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d, _, topk_indices = site.types
        return (Type(d.dtype, (*topk_indices.dims[:-1], d.last)),)


class UnpermuteGrad(Operator):
    """Gradients of the slots y [slot, hidden] and of the weights [.., k]."""

    kind = "unpermute_grad"
    tiled_twice = True
    operands = ("d", "y", "sort_indices", "weight")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[1], site.types[3])


class SequenceBalanceLossGrad(_LikeSecond):
    """Gradient of the scores, through P_i only: the count f_i has none (equations 17 to 20)."""

    kind = "sequence_balance_loss_grad"
    operands = ("d", "score")
    attrs: ClassVar = {"k": int}


class CrossEntropyGrad(_LikeSecond):
    """d * (softmax(logits) - onehot(label)) where the label counts, else 0."""

    kind = "cross_entropy_grad"
    operands = ("d", "logits", "labels")


def _meets(kind: str, dy: Type, weights: tuple[Type, ...]) -> None:
    rows = sum(w.dims[-2].size or 0 for w in weights)
    if dy.last.size != rows:
        raise TypeMismatch(f"{kind}: {dy.last.words} does not meet {rows} rows of weights", 0)


class SumOver(Operator):
    """The sum over one dimension: the gradient of `broadcast`."""

    kind = "sum_over"
    sums = "all"
    operands = ("x",)
    attrs: ClassVar = {"dim": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        (dim,) = dims_of(site.attrs["dim"])
        if dim not in x.dims:
            raise TypeMismatch(f"{cls.kind}: there is no {dim.words} in {x.words}", 0)
        return (x.with_dims(*(d for d in x.dims if d != dim)),)


class SumTo(Operator):
    """The gradient of what was broadcast: x summed over its first `leading` dimensions, and over
    each dimension of `ones`, which stays with size 1.

    `ones` holds its place, counted from the end as -1, and its name, in turn.
    """

    kind = "sum_to"
    sums = "all"
    operands = ("x",)
    attrs: ClassVar = {"leading": int, "ones": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        leading, ones = site.number("leading"), ones_of(site.attrs["ones"])
        dims = list(x.dims)
        if leading > len(dims) or any(-place > len(dims) - leading for place in ones):
            raise TypeMismatch(f"{cls.kind}: {x.words} has fewer dimensions than are summed", 0)
        for place, name in ones.items():
            dims[place] = Dim(name, 1)
        return (x.with_dims(*dims[leading:]),)


def ones_of(value: Attr) -> dict[int, str]:
    """The dimensions that `sum_to` leaves with size 1: name by place from the end."""
    assert isinstance(value, tuple)
    return {int(place): str(name)  # type: ignore[arg-type]
            for place, name in zip(value[::2], value[1::2], strict=True)}  # fmt: skip


class ExpandLike(Operator):
    """A scalar in every place of the shape of x: the gradient of `sum`."""

    kind = "expand_like"
    sums = "own"
    operands = ("d", "x")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[1].whole.with_dtype(site.types[0].dtype),)


class ZerosLike(Operator):
    """Zeros of the type of x: the gradient of what nothing depends on."""

    kind = "zeros_like"
    sums = "own"
    operands = ("x",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (site.types[0].whole,)


class _Pad(Operator):
    operands = ("x",)
    sums = "all"
    attrs: ClassVar = {"dim": str, "count": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        count = site.number("count")
        if not any(d.name == site.attrs["dim"] and d.offset >= count for d in x.dims):
            raise TypeMismatch(f"{cls.kind}: {x.words} lacks no {count} entries", 0)
        dim = site.attrs["dim"]
        longer = (Dim(d.name, None, d.offset - count) if d.name == dim else d for d in x.dims)
        return (x.with_dims(*longer),)


class PadFirst(_Pad):
    """Zeros before x along a run-time dimension: the gradient of `drop_first`."""

    kind = "pad_first"


class PadLast(_Pad):
    """Zeros after x along a run-time dimension: the gradient of `drop_last`."""

    kind = "pad_last"


class Rename(Operator):
    """x with its last dimension under another name."""

    kind = "rename"
    view = True
    sums = "all"
    operands = ("x",)
    attrs: ClassVar = {"dim": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (x,) = site.types
        (dim,) = dims_of(site.attrs["dim"])
        if x.last.size != dim.size:
            raise TypeMismatch(f"{cls.kind} of {x.last.words} to {dim.words}", 0)
        return (x.with_last(dim),)
