"""The training objective."""

from __future__ import annotations

from compiler.graph.types import Type
from compiler.ops.base import Operator, Site, TypeMismatch, need_float, need_rank


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


class CountLabels(Operator):
    """Number of labels other than -100, and at least one, as a divisor."""

    kind = "count_labels"
    operands = ("labels",)

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (Type("f32"),)
