"""The backward pass in two: gradients of inputs, for which others wait, and those of weights.

`G_backward` keeps what leads to the gradients of G's arguments; `G_weights` computes the rest, at
any later time. What the one makes and the other reads is kept, as between forward and backward.
Schedules without bubbles need that: DeepSeek-V3 report, section 3.2.1; arXiv 2401.10241.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import BACKWARD, WEIGHTS, Attr, Graph, Op, Program, Region, Value, Weight
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description

CALLS = ("call", "repeat_backward")


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if not program.backward or program.weights:
        return ()
    for name in list(program.graphs):
        if name.endswith(BACKWARD) and program.graphs[name].ops[0].kind == "kept":
            _split(program, program.graphs[name])
    return ()


SPLIT_BACKWARD = Pass(
    "split_backward",
    "gradients of weights in graphs of their own, for schedules in which they can wait",
    _run,
    requires="differentiate",
    ensures="no gradient of a weight in the graphs of gradients of inputs",
    essential=True,
)


def _split(program: Program, backward: Graph) -> None:
    """Leaves the gradients of inputs in `backward`, and adds a graph of what is left."""
    needed = _needed(backward)
    first = [op for op in backward.ops[:-1] if op in needed]
    rest = [op for op in backward.ops[:-1] if op not in needed]
    name = backward.name.removesuffix(BACKWARD) + WEIGHTS
    weights = Graph(
        name,
        about=f"The gradients of the weights of {backward.name.removesuffix(BACKWARD)}.",
        span=backward.span,
    )
    made = {v for op in rest for v in op.results}
    crossing = list(dict.fromkeys(v for op in rest for v in op.operands if v not in made))
    copies = {v: Value(v.name, v.type) for v in crossing}
    for op in backward.ops[:-1]:
        if op in rest:
            op.operands = [copies.get(v, v) for v in op.operands]
            weights.ops.append(op)
        elif op.kind in CALLS:
            _call(op, weights.ops, program)
    if not weights.ops:
        return
    span = backward.ops[0].spans
    entries = tuple(v.name for v in crossing)
    kept = {v.name: v.type for v in crossing}
    keep = [Op("keep", crossing, attrs={"entries": entries}, spans=span)] if crossing else []
    backward.ops[:-1] = [*first, *keep]
    backward.kept |= kept
    weights.kept = kept
    attrs: dict[str, Attr] = {"entries": entries, "results": (), "arguments": ()}
    head = Op("kept", attrs=attrs, results=list(copies.values()), spans=span)
    weights.ops = [head, *weights.ops, Op("return", spans=span)]
    weights.weights = _used(weights, backward)
    backward.weights = _used(backward, backward)
    program.graphs[name] = weights


def _needed(backward: Graph) -> set[Op]:
    """Calls, and the operators that they and the results of a graph need."""
    needed = {op for op in backward.ops if op.kind in ("kept", "return", *CALLS)}
    wanted = {v for op in needed for v in op.operands}
    for op in reversed(backward.ops):
        if op in needed or wanted & set(op.results):
            needed.add(op)
            wanted.update(op.operands)
    return needed


def _call(op: Op, ops: list[Op], program: Program) -> None:
    """The weights' part of what is called, if it has one; layers of a loop from last to first."""
    if op.kind == "call":
        callee = str(op.attrs["callee"]).removesuffix(BACKWARD) + WEIGHTS
        if callee in program.graphs:
            scope = op.attrs["scope"]
            ops.append(Op("call", attrs={"callee": callee, "scope": scope}, spans=op.spans))
        return
    inside: list[Op] = []
    for inner in op.regions[0].ops[:-1]:
        if inner.kind in CALLS:
            _call(inner, inside, program)
    if inside:
        inside.append(Op("yield", spans=op.spans))
        attrs = {**op.attrs, "carried": 0}
        loop = Op("repeat_backward", attrs=attrs, regions=[Region([], inside)], spans=op.spans)
        ops.append(loop)


def _used(graph: Graph, of: Graph) -> dict[str, Weight]:
    used = {s for op in graph.walk() for s in op.symbols}
    return {name: weight for name, weight in of.weights.items() if name in used}
