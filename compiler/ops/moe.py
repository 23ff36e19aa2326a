"""Routing, experts and their balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from compiler.graph.core import Attributes, Op, Value
from compiler.graph.types import Dim, Type
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    TypeMismatch,
    dims_of,
    grad_name,
    need_float,
    need_rank,
    only,
)
from compiler.ops.linear import Linear


def slots(op: Attributes, topk_indices: Type, sizes: Mapping[str, int]) -> int:
    """Rows that the experts of one rank work on, all together: for each token its k choices.

    Tokens that arrived from other ranks chose experts elsewhere, too: `dispatch` knows the slots.
    """
    if any(dim.name == "arrived" for dim in topk_indices.dims):
        return sizes["slot"]
    return computing(op, topk_indices.count(sizes))


def computing(op: Attributes, choices: int) -> int:
    """Of so many choices those that fall on experts with weights, where all are chosen evenly.

    `op` says how many experts there are, `count`, and how many more give back their tokens.
    """
    count, identity = op.attrs["count"], op.attrs.get("identity", 0)
    each = count if isinstance(count, int) else dims_of(count)[0].size
    assert isinstance(each, int) and isinstance(identity, int)
    return round(choices * each / (each + identity))


class TopkGroups(Operator):
    """The `k` experts with the highest score among the best `topk_group` of `n_group` groups.

    The bias selects only; the weights come from the scores themselves, divided by their sum when
    `normalize`, times `scale`. A group's score is the sum of its two highest (`top2_sum`) or its
    highest (`max`). Dropped groups count as -inf; ties go to the lowest index.
    DeepSeek-V3 report, equations 13 to 16 and section 2.1.2, node-limited routing.
    """

    kind = "topk_groups"
    operands = ("score",)
    symbols = ("bias?",)
    attrs: ClassVar = {
        "k": tuple,
        "n_group": int,
        "topk_group": int,
        "group_score": str,
        "normalize": bool,
        "scale": float,
    }

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (score,) = site.types
        need_float(cls.kind, score)
        need_rank(cls.kind, score, 1)
        (k,) = dims_of(site.attrs["k"])
        experts, groups = score.last.size or 0, site.number("n_group")
        if groups < 1 or experts % groups:
            raise TypeMismatch(f"{score.last.words} cannot be cut into {groups} equal groups", 0)
        if not 1 <= site.number("topk_group") <= groups:
            raise TypeMismatch(
                f"topk_group is {site.number('topk_group')}, of {groups} groups that there are"
            )
        candidates = site.number("topk_group") * experts // groups
        if (k.size or 0) > candidates:
            raise TypeMismatch(f"{k.words} is more than the {candidates} experts to choose from", 0)
        for bias in site.weights:
            if bias.dims != (score.last,):
                raise TypeMismatch(f"the bias is for {bias.words}, the scores {score.words}", 1)
        return (Type("i64", (*score.dims[:-1], k)), score.with_last(k))

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (score,) = op.operands
        return at.add(
            "topk_groups_grad", [only(d), score, op.results[0]], names=[f"d_{score.name}"],
            normalize=op.attrs["normalize"], scale=op.attrs["scale"],
        )  # fmt: skip


SCORINGS = ("sigmoid", "softmax")
"""How a gate makes an affinity of its product with a token: DeepSeek-V3, DeepSeek-V2."""


class Gate(TopkGroups):
    """The whole gate after its product with the tokens: affinity and choice in one.

    x [.., experts] -> the affinities by `scoring`, sigmoid or softmax; then `topk_groups` of them.
    """

    kind = "gate"
    operands = ("x",)
    attrs: ClassVar = {"scoring": str, **TopkGroups.attrs}
    saving: ClassVar[tuple[str, ...]] = ("gate_saving", "affinity")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        if site.attrs["scoring"] not in SCORINGS:
            raise TypeMismatch(f"scoring is {' or '.join(SCORINGS)}, not {site.attrs['scoring']}")
        return super().infer(site)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (x,) = op.operands
        topk_indices, _, affinity = op.results
        _, d_weight, d_affinity = d
        names, scoring = [f"d_{x.name}"], op.attrs["scoring"]
        normalize, scale = op.attrs["normalize"], op.attrs["scale"]
        if d_weight is not None and d_affinity is not None:
            return at.add(
                "gate_grad", [d_weight, d_affinity, affinity, topk_indices], names=names,
                scoring=scoring, normalize=normalize, scale=scale,
            )  # fmt: skip
        if d_weight is not None:
            (d_affinity,) = at.add(
                "topk_groups_grad", [d_weight, affinity, topk_indices], names=["d_affinity"],
                normalize=normalize, scale=scale,
            )  # fmt: skip
        if d_affinity is None:
            return [None]
        return at.add(f"{scoring}_grad", [d_affinity, affinity], names=names)


class Experts(Operator):
    """sum_k weight_k * expert_{route_k}(x): each token through the experts that were chosen for it.

    x [.., hidden], topk_indices and weight [.., k]. The region is one expert on its tokens
    [token, hidden]; its weights are named `experts.*`. No token is dropped. An index of -1 is an
    expert of another rank, one from `count` on an expert that gives back its token, of which there
    are `identity` (`identity_weight`): neither adds anything here. Equation 12.
    """

    kind = "experts"
    operands = ("x", "topk_indices", "weight")
    attrs: ClassVar = {"count": int, "identity?": int}
    regions = 1

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, topk_indices, weight = site.types
        (arguments, yields) = site.regions[0]
        if topk_indices.dims != weight.dims or topk_indices.dims[:-1] != x.dims[:-1]:
            raise TypeMismatch(
                f"experts: {topk_indices.words} does not fit the tokens {x.words}", 1
            )
        inside = Type(x.dtype, (Dim("token"), x.last))
        if arguments != (inside,):
            raise TypeMismatch(
                f"an expert takes {inside}, this one {', '.join(map(str, arguments))}"
            )
        if (
            len(yields) != 1
            or len(yields[0].dims) != len(inside.dims)
            or yields[0].dtype != x.dtype
        ):
            raise TypeMismatch(f"an expert gives {x.dtype}[token, ..], this one {yields}")
        return (x.with_last(yields[0].last),)

    @classmethod
    def inner_sizes(cls, site: Site, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """All experts are counted together: each token k times."""
        return {**sizes, "token": slots(site, site.types[1], sizes)}


class IdentityWeight(Operator):
    """The weight with which each token is added to itself: the sum of those from `count` on.

    topk_indices and weight [.., k] -> [.., 1]. Experts from `count` on compute nothing: what they
    give is the token that they are given (LongCat-Flash, arXiv 2509.01322, section 2.1.1).
    """

    kind = "identity_weight"
    cheap = True
    operands = ("topk_indices", "weight")
    attrs: ClassVar = {"count": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        topk_indices, weight = site.types
        if topk_indices.dims != weight.dims:
            raise TypeMismatch(f"identity_weight: {weight.words} for {topk_indices.words}", 1)
        return (weight.with_last(Dim("1", 1)),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        topk_indices, weight = op.operands
        names, count = [f"d_{weight.name}"], op.number("count")
        found = at.add("identity_weight_grad", [only(d), topk_indices], names=names, count=count)
        return [None, *found]


class Permute(Operator):
    """Copies of the tokens x [.., hidden], one for each of topk_indices [.., k], sorted by expert.

    -> sorted [slot, hidden]; offs [experts], the offset at which each expert's slots end, as in
    `torch.grouped_mm`; sort_indices [slot], the place in the flattened topk_indices that each slot
    came from. The sort is stable. An index of -1 is an expert of another rank, one from `count` on
    an expert that gives back its token, of which there are `identity`: no slot.
    """

    kind = "permute"
    tiled_twice = True
    sums = "own"
    operands = ("x", "topk_indices")
    attrs: ClassVar = {"count": tuple, "identity?": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, topk_indices = site.types
        if topk_indices.dims[:-1] != x.dims[:-1]:
            raise TypeMismatch(
                f"permute: {topk_indices.words} does not fit the tokens {x.words}", 1
            )
        slot = Dim("slot", axes=topk_indices.axes)
        (experts,) = dims_of(site.attrs["count"])
        # Each rank counts the slots of its own experts.
        spread = tuple(axis for axis in topk_indices.axes if axis == "expert")
        offs = Type("i32", (experts._replace(axes=spread),))
        return (Type(x.dtype, (slot, x.last)), offs, Type("i64", (slot,)))

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        return {"slot": slots(site, site.types[1], sizes)}

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        x, topk_indices = op.operands
        _, _, sort_indices = op.results
        return [
            *at.add("permute_grad", [only(d), sort_indices, topk_indices], names=[f"d_{x.name}"]),
            None,
        ]


class GroupedLinear(Linear):
    """y = x W_e^T for the slots of each expert e: one product for all experts.

    x [slot, in], offs [experts]; weight [out, in] of each expert, named `experts.*`. The results of
    several weights stand side by side, as those of `linear` do.
    """

    kind = "grouped_linear"
    sums = "first"
    operands = ("x", "offs")


class GroupedParameter(Operator):
    """The weight of its expert for each slot: a bias that each expert has of its own.

    x [slot, ..] only says how many slots there are, offs [experts]; weight [n] of each expert,
    named `experts.*` -> [slot, n].
    """

    kind = "grouped_parameter"
    cheap = True
    operands = ("x", "offs")
    symbols = ("weight",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (weight,) = site.weights
        return (weight.with_dims(site.types[0].dims[0], *weight.dims),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        if at.trainable(op.symbols):
            names = [grad_name(op.symbols)]
            dw = at.add("grouped_parameter_grad", [only(d), op.operands[1]], names=names)
            at.add("accumulate_grad", dw, op.symbols)
        return [None, None]


class Unpermute(Operator):
    """sum_k weight_k * y of the slots that each token was copied to: the inverse of `permute`.

    y [slot, hidden], sort_indices [slot], weight [.., k] -> [.., hidden]. Equation 12.
    """

    kind = "unpermute"
    sums = "first"
    operands = ("y", "sort_indices", "weight")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        y, sort_indices, weight = site.types
        if sort_indices.dims != y.dims[:1]:
            raise TypeMismatch(f"unpermute: {sort_indices.words} does not fit {y.words}", 1)
        return (Type(y.dtype, (*weight.dims[:-1], y.last)),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        y, sort_indices, weight = op.operands
        names = [f"d_{y.name}", f"d_{weight.name}"]
        dy, dweight = at.add("unpermute_grad", [only(d), y, sort_indices, weight], names=names)
        return [dy, None, dweight]


class SequenceBalanceLoss(Operator):
    """sum_i f_i P_i for each sequence, averaged over the batch (report, equations 17 to 20).

    f_i is the share of tokens whose k highest scores hold expert i, times experts / k; P_i the mean
    of the scores divided by their sum. One at perfect balance; the weight alpha is applied outside.
    """

    kind = "sequence_balance_loss"
    operands = ("score",)
    attrs: ClassVar = {"k": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (score,) = site.types
        need_float(cls.kind, score)
        need_rank(cls.kind, score, 3)
        if not 1 <= site.number("k") <= (score.last.size or 0):
            raise TypeMismatch(f"k is {site.number('k')}, of {score.last.words}", 0)
        return (Type("f32"),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        (score,) = op.operands
        names = [f"d_{score.name}"]
        return at.add("sequence_balance_loss_grad", [only(d), score], names=names, k=op.attrs["k"])


class ExpertLoad(Operator):
    """Number of tokens that went to each expert."""

    kind = "expert_load"
    operands = ("topk_indices",)
    attrs: ClassVar = {"count": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        if site.types[0].dtype != "i64":
            raise TypeMismatch(f"expert_load counts expert numbers, got {site.types[0].dtype}", 0)
        return (Type("i64", dims_of(site.attrs["count"])),)
