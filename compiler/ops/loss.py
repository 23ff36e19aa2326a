"""The training objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compiler.graph.core import Op, Value
from compiler.graph.types import Type
from compiler.ops.base import (
    Adjoint,
    Operator,
    Site,
    TypeMismatch,
    grad_name,
    need_float,
    need_rank,
    only,
)

MEANS = ("sequence_balance_loss", "indexer_loss")
"""Losses that are means over the sequences of a micro-batch: over several, parts of a mean."""


class CrossEntropy(Operator):
    """-sum log softmax(logits)[label] over labels other than -100, in float32.

    logits [batch, seq, vocab_size], labels [batch, seq]: the token that follows each position.
    """

    kind = "cross_entropy"
    operands = ("logits", "labels")

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        logits, labels = site.types
        need_float(cls.kind, logits)
        need_rank(cls.kind, logits, 2)
        if labels.dims != logits.dims[:-1] or labels.dtype != "i64":
            raise TypeMismatch(
                f"cross_entropy needs a label for each position: {logits} does not meet {labels}", 1
            )
        return (Type("f32"),)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        names = [f"d_{op.operands[0].name}"]
        return [*at.add("cross_entropy_grad", [only(d), *op.operands], names=names), None]


class LinearCrossEntropy(Operator):
    """`cross_entropy` of a head's scores x W^T, which are made in chunks and never stored.

    x [batch, seq, hidden_size], labels [batch, seq], weight [vocab_size, hidden_size]. Since the
    scores are gone afterwards, the gradients of x and of the weight are made along with the loss,
    for a gradient of 1.
    """

    kind = "linear_cross_entropy"
    operands = ("x", "labels")
    symbols = ("weight",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, labels = site.types
        weight = site.weights[0]
        if labels.dims != x.dims[:-1] or labels.dtype != "i64":
            raise TypeMismatch(f"{cls.kind} needs a label for each position of {x}", 1)
        if weight.last != x.last:
            raise TypeMismatch(f"{cls.kind} expects {weight.last.words}, got {x.last.words}", 0)
        return (Type("f32"), x, weight.with_dtype(x.dtype))

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        # Scores, and from them the gradients of x and of the weight.
        return 3 * 2 * site.types[0].count(sizes) * (site.weights[0].dims[0].size or 0)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        x, _ = op.operands
        _, x_grad, weight_grad = op.results
        dy = only(d)
        if at.trainable(op.symbols):
            dw = at.add("mul", [weight_grad, dy], names=[grad_name(op.symbols)])
            at.add("accumulate_grad", dw, op.symbols)
        return [*at.add("mul", [x_grad, dy], names=[f"d_{x.name}"]), None]


class CountLabels(Operator):
    """Number of labels other than -100, and at least one, as a divisor."""

    kind = "count_labels"
    differentiable = False
    operands = ("labels",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (Type("f32"),)
