"""Head and loss in one: the scores of the vocabulary are made in chunks, never all at once.

For DeepSeek-V3 the scores of one sequence of 4,096 tokens are 1 GB in bf16, and their gradients as
much again, several times what a layer keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program, Value
from compiler.passes.base import Pass
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    return rewrite(program, "cross_entropy", _fuse)


FUSE_LOSS = Pass(
    "fuse_loss",
    "head and cross entropy in one, in chunks of the vocabulary's scores",
    _run,
    ensures="no scores that only a loss reads",
)


def _fuse(at: Rewriter) -> Sequence[Value] | Miss:
    logits, labels = at.op.operands
    head = at.producer(logits, "linear")
    if head is None:
        return Miss("the scores are not made by a linear", at.op)
    if len(at.uses[logits]) > 1:
        return Miss("others read the scores, too", head)
    if at.builder.graph.weights[head.symbols[0]].fp8:
        return Miss("the head is in FP8", head)
    if len(head.symbols) > 1:
        return Miss("the head is several weights in one", head)
    x = head.operands[0]
    names = [at.op.result.name, f"{x.name}_grad", "head_grad"]
    loss, _, _ = at.add("linear_cross_entropy", [x, labels], head.symbols, names=names)
    return [loss]
