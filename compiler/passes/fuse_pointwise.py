"""Neighbours without a matrix product become one: their tensors are read and written once.

silu(gate) * up is `swiglu`; a residual that is added and then normed is `add_rms_norm`, which gives
both the sum and the norm. Each of them is bound by memory, so that what is saved is a pass over it.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program, Value
from compiler.passes.base import Pass
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    return [*rewrite(program, "mul", _swiglu), *rewrite(program, "rms_norm", _add_rms_norm)]


FUSE_POINTWISE = Pass(
    "fuse_pointwise",
    "gate and product of SwiGLU in one, residual sum and norm in one",
    _run,
    ensures="no silu that only a product reads, no sum that is normed next",
)


def _swiglu(at: Rewriter) -> Sequence[Value] | Miss:
    for gate, up in (at.op.operands, reversed(at.op.operands)):
        silu = at.producer(gate, "silu")
        if silu is not None and len(at.uses[gate]) == 1 and gate.type == up.type:
            return at.add("swiglu", [silu.operands[0], up], names=[at.op.result.name])
    return Miss("no factor is a silu that nothing else reads", at.op)


def _add_rms_norm(at: Rewriter) -> Sequence[Value] | Miss:
    (x,) = at.op.operands
    add = at.producer(x, "add")
    if add is None:
        return Miss("what is normed is no sum", at.op)
    if any(v.type != x.type for v in add.operands):
        return Miss("what is added is broadcast", add)
    if at.has_use_before(add):
        return Miss("the sum is read before it is normed", add)
    names = [x.name, at.op.result.name]
    total, normed = at.add(
        "add_rms_norm", add.operands, at.op.symbols, names=names, eps=at.op.attrs["eps"]
    )
    at.builder.graph.replace_uses(x, total)
    return [normed]
