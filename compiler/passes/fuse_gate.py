"""The gate in one: affinities from the products with its weight, and the choice by them.

Each of a token's scores is read once; the affinities are written only where something else reads
them: the balance loss, or the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program, Value
from compiler.ops.moe import SCORINGS
from compiler.passes.base import Pass
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    return rewrite(program, "topk_groups", _fuse)


FUSE_GATE = Pass(
    "fuse_gate",
    "affinity of the gate and choice of experts in one",
    _run,
    ensures="no sigmoid or softmax by which experts are chosen next",
)


def _fuse(at: Rewriter) -> Sequence[Value] | Miss:
    (affinity,) = at.op.operands
    made = next((op for s in SCORINGS if (op := at.producer(affinity, s))), None)
    if made is None:
        return Miss(f"the scores are made by no {' or '.join(SCORINGS)}", at.op)
    names = [v.name for v in at.op.results]
    attrs = {"scoring": made.kind, **at.op.attrs}
    if len(at.uses[affinity]) == 1:
        return at.add("gate", made.operands, at.op.symbols, names=names, **attrs)
    if at.has_use_before(made):
        return Miss("the scores are read before experts are chosen by them", made)
    names.append(affinity.name)
    *chosen, again = at.add("gate_saving", made.operands, at.op.symbols, names=names, **attrs)
    at.builder.graph.replace_uses(affinity, again)
    return chosen
