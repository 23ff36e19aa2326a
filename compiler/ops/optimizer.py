"""What happens to weights once a step, after the gradients of all micro-batches."""

from __future__ import annotations

from typing import ClassVar

from compiler.graph.types import Type
from compiler.ops.base import Operator, Site, TypeMismatch, dims_of


def _of_weight(site: Site) -> Type:
    """The type of a weight; of that of all experts of a rank at once, [experts, ..]."""
    weight = site.weights[0]
    return weight.with_dims(*dims_of(site.attrs["experts"]), *weight.dims)


class Gradient(Operator):
    """What `accumulate_grad` added up for a weight: on each rank of `axes` a term of the sum.

    `experts` are those of this rank, if it is a weight of experts; they are spread over `over`.
    """

    kind = "gradient"
    symbols = ("weight",)
    attrs: ClassVar = {"experts": tuple, "over": tuple, "axes": tuple}
    sums = "own"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        whole, over = _of_weight(site), site.texts("over")
        return (whole.spread_first(over).with_partial(site.texts("axes")),)


class SumSquares(Operator):
    """The sum of the squares of a gradient's elements: on each rank of those that it has."""

    kind = "sum_squares"
    operands = ("d",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (Type("f32"),)


class Update(Operator):
    """The new values of a weight, from its gradient: those of this rank's share, [shard].

    Gradients are multiplied by `factor` first, which clips them: arXiv 1211.5063.

    The share is that of this rank among the `ranks` of `axes`; without axes it is the whole weight.
    What an optimizer remembers (AdamW's moments) is there for the share only: ZeRO-1, arXiv
    1910.02054. Which optimizer it is, is for the trainer to say.
    """

    kind = "update"
    operands = ("d", "factor")
    symbols = ("weight",)
    attrs: ClassVar = {"experts": tuple, "axes": tuple, "ranks": int}
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        d, _ = site.types
        share = -(-_of_weight(site).count() // site.number("ranks"))
        if d.partial or d.count() != (share if site.number("ranks") > 1 else d.count()):
            raise TypeMismatch(f"update takes the whole gradient of a share of {share}, got {d}", 0)
        return (d,)


class Assign(Operator):
    """Replaces a weight by new values."""

    kind = "assign"
    operands = ("x",)
    symbols = ("weight",)
    attrs: ClassVar = {"experts": tuple}
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, weight = site.types[0], _of_weight(site)
        if [d.size for d in x.dims] != [d.size for d in weight.dims] or x.partial:
            raise TypeMismatch(f"{x} is no value of {weight}", 0)
        return ()
