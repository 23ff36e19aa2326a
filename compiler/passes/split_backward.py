"""The backward pass in two: gradients of inputs, for which others wait, and those of weights.

The backward graph of a graph G keeps what leads to the gradients of G's arguments; the graph of the
weights computes the rest, at any later time. It reads what the backward graph saves for it.
Schedules without bubbles need that: DeepSeek-V3 report, section 3.2.1; arXiv 2401.10241.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compiler.graph.core import Graph, Op, Program, Region, Value
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.passes.differentiate import save
from compiler.rewrite import Miss
from dsl.load import Description

# By convention the suffix of the graph of gradients of weights, after its forward graph's name.
SUFFIX = "_weights"


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if not program.backward or program.weights:
        return ()
    for name in list(program.derivatives):  # callees stand before callers
        _split(program, name)
    return ()


SPLIT_BACKWARD = Pass(
    "split_backward",
    "gradients of weights in graphs of their own, for schedules in which they can wait",
    _run,
    requires="differentiate",
    ensures="no gradient of a weight in the graphs of gradients of inputs",
    essential=True,
)


def _split(program: Program, forward: str) -> None:
    """Leaves the gradients of inputs in the backward graph, and adds a graph of what is left."""
    derivative = program.derivatives[forward]
    backward = program.graphs[derivative.backward]
    needed = _needed(backward)
    first = [op for op in backward.ops[:-1] if op in needed]
    rest = [op for op in backward.ops[:-1] if op not in needed]
    about = f"The gradients of the weights of {forward}."
    weights = Graph(forward + SUFFIX, about=about, span=backward.span)
    made = {v for op in rest for v in op.results}
    saved = list(dict.fromkeys(v for op in rest for v in op.operands if v not in made))
    copies = {v: Value(v.name, v.type) for v in saved}
    for op in backward.ops[:-1]:
        if op in rest:
            op.operands = [copies.get(v, v) for v in op.operands]
            weights.ops.append(op)
        elif OPS[op.kind].calls:
            _call(op, weights.ops, program)
    if not weights.ops:
        return
    span = backward.ops[0].spans
    backward.ops = [*first, backward.ops[-1]]
    save(backward, saved)
    head = Op("saved", results=list(copies.values()), spans=span)
    weights.ops = [head, *weights.ops, Op("return", spans=span)]
    weights.weights = dict(backward.weights)
    weights.drop_unused_weights()
    backward.drop_unused_weights()
    program.graphs[weights.name] = weights
    program.derivatives[forward] = replace(derivative, weights=weights.name)


def _needed(backward: Graph) -> set[Op]:
    """Calls, and the operators that they and the results of a graph need."""
    needed = {o for o in backward.ops if o.kind in ("saved", "return") or OPS[o.kind].calls}
    wanted = {v for op in needed for v in op.operands}
    for op in reversed(backward.ops):
        if op in needed or wanted & set(op.results):
            needed.add(op)
            wanted.update(op.operands)
    return needed


def _call(op: Op, ops: list[Op], program: Program) -> None:
    """The weights' part of what is called, if it has one; layers of a loop from last to first."""
    if op.callee:
        callee = program.derivatives[program.forward_of(op.callee)].weights
        if callee:
            scope = op.attrs["scope"]
            ops.append(Op("call", attrs={"callee": callee, "scope": scope}, spans=op.spans))
        return
    inside: list[Op] = []
    for inner in op.regions[0].ops[:-1]:
        if OPS[inner.kind].calls:
            _call(inner, inside, program)
    if inside:
        inside.append(Op("yield", spans=op.spans))
        attrs = {**op.attrs, "carried": 0}
        loop = Op("repeat_backward", attrs=attrs, regions=[Region([], inside)], spans=op.spans)
        ops.append(loop)
