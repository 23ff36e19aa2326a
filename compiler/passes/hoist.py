"""What depends on the arguments of a block only is computed by its callers, once for all layers.

A table of rotary embedding follows from the positions, which are the same in every layer. It moves
out of the block that reads it, through all blocks around and out of their loops, and becomes an
argument on the way. Which operators are worth it, `Operator.hoist` says.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Value, list_of
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.passes.simplify import common_subexpression_elimination
from compiler.rewrite import Miss
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    # Callees stand before callers: what arrives in a caller goes on from there.
    for graph in program.graphs.values():
        _leave_regions(graph.ops)
        common_subexpression_elimination(graph)
        if graph is not program.main:
            _move_to_callers(graph, program)
    return ()


HOIST = Pass(
    "hoist",
    "compute once, outside, what follows from the arguments of a block",
    _run,
    ensures="tables of rotary embedding are made in the outermost block and handed down",
)


def _leave_regions(ops: list[Op]) -> None:
    """Moves operators that read nothing of their region in front of what holds the region."""
    for op in list(ops):
        for region in op.regions:
            _leave_regions(region.ops)
            free = _free(region.ops, region.args)
            region.ops = [o for o in region.ops if o not in free]
            at = ops.index(op)
            ops[at:at] = free


def _move_to_callers(graph: Graph, program: Program) -> None:
    """Every call computes the free operators before, and hands over their results."""
    calls = list(program.calls_of(graph.name))
    # Parts of the outermost block are called under its own scope: there they are where they belong.
    free = _free(graph.ops, ()) if all(op.attrs["scope"] for _, op in calls) else []
    if not calls or not free:
        return
    graph.ops = [op for op in graph.ops if op not in free]
    formal = list(graph.args)
    graph.args += [v for op in free for v in op.results]
    for caller, call in calls:
        builder = Builder(caller, program.graphs)
        builder.ops = []
        values = dict(zip(formal, call.operands, strict=True))
        for op in free:
            _copy(op, values, builder)
        call.operands = [values[v] for v in graph.args]
        ops = list_of(caller, call)
        at = ops.index(call)
        ops[at:at] = builder.ops


def _free(ops: Sequence[Op], inside: Sequence[Value]) -> list[Op]:
    """Operators worth moving that read none of the values `inside`, nor any made of them."""
    made, free = set(inside), []
    for op in ops:
        if OPS[op.kind].hoist and not op.symbols and not made.intersection(op.operands):
            free.append(op)
        else:
            made.update(op.results)
    return free


def _copy(op: Op, values: dict[Value, Value], builder: Builder) -> None:
    """The same operator on the caller's values, which `values` gives for the callee's."""
    operands, names = [values[v] for v in op.operands], [v.name for v in op.results]
    results = builder.add(
        op.kind, operands, (), names=names, regions=(), spans=op.spans, **op.attrs
    )
    values.update(zip(op.results, results, strict=True))
