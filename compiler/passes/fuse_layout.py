"""Splits and concatenations join the operator between them: numbers that only move are not copied.

- Queries, of which each head turns its last numbers: split, rotate, concat are `rotate_last`; so
  are their gradients.
- Keys of latent attention, a part of each head's own and one that all share: rotate, broadcast,
  concat are `join_rotated`. Their gradients come with those of values, which the same product
  made: split, sum over heads, rotate, concat are `join_rotated_grad`.
- The gradients of gate and up, which one product made, are concatenated: swiglu_grad, concat
  are `swiglu_grad_joined`.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program, Value
from compiler.ops.base import dims_attr
from compiler.passes.base import Pass
from compiler.passes.simplify import dead_code_elimination
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    misses = rewrite(program, "concat", _joined)
    dead_code_elimination(program)
    return misses


FUSE_LAYOUT = Pass(
    "fuse_layout",
    "rotation with the split and concatenation around it, gradients of gate and up in one tensor",
    _run,
    requires="gradients and recomputation, so that all of them are found",
    ensures="no concat of what a rotation left and turned, or of both gradients of one swiglu",
)


def _joined(at: Rewriter) -> Sequence[Value] | Miss:
    """The first rule that applies, or that no rule does."""
    for rule in (_rotate_last, _join_rotated, _join_rotated_grad, _swiglu_grad):
        at.matched.clear()
        found = rule(at)
        if found is not None:
            return found
    return Miss("what is joined was neither rotated nor the gradient of gate and up", at.op)


def _rotate_last(at: Rewriter) -> Sequence[Value] | None:
    *before, last = at.op.operands
    rotate = at.producer(last, "rotate")
    if rotate is None or len(at.uses[last]) > 1:
        return None
    x, *table = rotate.operands
    split = at.producer(x, "split")
    if split is None or split.results != [*before, x]:
        return None
    operands, names = [split.operands[0], *table], [at.op.result.name]
    return at.add("rotate_last", operands, names=names, into=at.op.attrs["into"])


def _join_rotated(at: Rewriter) -> Sequence[Value] | None:
    *before, last = at.op.operands
    broadcast = at.producer(last, "broadcast")
    if broadcast is None or len(at.uses[last]) > 1 or len(before) != 1:
        return None
    (shared,) = broadcast.operands
    rotate = at.producer(shared, "rotate")
    if rotate is None or len(at.uses[shared]) > 1:
        return None
    names = [at.op.result.name]
    return at.add(
        "join_rotated", [*before, *rotate.operands], names=names, into=at.op.attrs["into"]
    )


def _join_rotated_grad(at: Rewriter) -> Sequence[Value] | None:
    if len(at.op.operands) != 2:
        return None
    own, d_v = at.op.operands
    split = at.producer(own, "split")
    if split is None or split.results[0] is not own or len(split.results) != 2:
        return None
    total = at.only_reader(split.results[1], "sum_over")
    rotate = total and at.only_reader(total.result, "rotate")
    if not total or not rotate or total.attrs["dim"] != dims_attr(own.type.dims[-2]):
        return None
    _, cos, back = rotate.operands
    turn = at.producer(back, "scale")
    if turn is None or turn.attrs["by"] != -1.0:
        return None
    if any(v in at.producers for v in (cos, *turn.operands)):  # are they there already?
        return None
    at.matched += [total, rotate]
    at.builder.names.discard(rotate.result.name)
    both, shared = at.add(
        "join_rotated_grad", [split.operands[0], d_v, cos, *turn.operands],
        names=[at.op.result.name, rotate.result.name],
        into=at.op.attrs["into"], shared=dims_attr(rotate.result.type.last),
    )  # fmt: skip
    at.erase(rotate, [shared])
    return [both]


def _swiglu_grad(at: Rewriter) -> Sequence[Value] | None:
    grad = at.producer(at.op.operands[0], "swiglu_grad")
    if grad is None or at.op.operands != grad.results:
        return None
    if any(len(at.uses[v]) > 1 for v in grad.results):
        return None
    names = [at.op.result.name]
    return at.add("swiglu_grad_joined", grad.operands, names=names, into=at.op.attrs["into"])
