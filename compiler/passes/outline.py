"""What lies between the layers becomes graphs of its own, so that the outermost block only calls.

Embedding before the layers, head and losses after them: each run of operators between two calls
is a part of the same module. A part is then differentiated like any block, and can be a stage of a
pipeline by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from compiler.graph.core import Graph, Op, Program, Value
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    main = program.main
    runs = _runs(main.ops[:-1])
    # A stage of a pipeline may hold no layers.
    if not program.boundary and (not any(map(_is_call, main.ops)) or len(runs) <= 1):
        return ()
    graphs = dict(program.graphs)
    ops: list[Op] = []
    number = -1
    for i, run in enumerate(runs):
        if _is_call(run[0]):
            ops += run
            continue
        number += 1
        end = "start" if i == 0 else "end" if i == len(runs) - 1 else f"middle_{number}"
        part, call = _part(f"{main.name}_{end}", run, main)
        graphs[part.name] = part
        ops.append(call)
    main.ops[:-1] = ops
    main.drop_unused_weights()
    # Callees stand before callers.
    del graphs[main.name]
    program.graphs = {**graphs, main.name: main}
    return ()


OUTLINE = Pass(
    "outline",
    "what lies between the layers becomes parts of their own",
    _run,
    ensures="the outermost block holds nothing but calls and loops of calls",
)


def _is_call(op: Op) -> bool:
    return OPS[op.kind].calls


def _runs(ops: Sequence[Op]) -> list[list[Op]]:
    """Neighbours that are calls, and neighbours that are none, in turn."""
    runs: list[list[Op]] = []
    for op in ops:
        if runs and _is_call(runs[-1][0]) == _is_call(op):
            runs[-1].append(op)
        else:
            runs.append([op])
    return runs


def _part(name: str, run: list[Op], main: Graph) -> tuple[Graph, Op]:
    """A graph of some operators, and the call that replaces them."""
    made = {v for op in run for v in op.results}
    inputs = dict.fromkeys(v for op in run for v in op.operands if v not in made)
    outside = {v for op in main.ops if op not in run for v in op.operands}
    outside |= {v for op in main.ops if op not in run for o in _inside(op) for v in o.operands}
    outputs = [v for op in run for v in op.results if v in outside]
    copies = _copies([*inputs, *(v for op in run for v in op.results)])
    ops = [
        Op(
            op.kind,
            [copies[v] for v in op.operands],
            op.symbols,
            dict(op.attrs),
            [],
            [copies[v] for v in op.results],
            op.spans,
        )
        for op in run
    ]
    ops.append(Op("return", [copies[v] for v in outputs], spans=run[-1].spans))
    symbols = dict.fromkeys(s for op in run for s in op.symbols)
    part = Graph(
        name,
        [copies[v] for v in inputs],
        ops,
        {s: main.weights[s] for s in symbols},
        result_names=tuple(copies[v].name for v in outputs),
        about=f"A part of {main.name}: {', '.join(dict.fromkeys(op.kind for op in run))}.",
        span=main.span,
    )
    call = Op(
        "call",
        list(inputs),
        attrs={"callee": name, "scope": ""},
        results=outputs,
        spans=tuple(dict.fromkeys(s for op in run for s in op.spans)),
    )
    return part, call


def _copies(values: Sequence[Value]) -> dict[Value, Value]:
    """A value for each, without the number of its name where that is not needed any more."""
    copies: dict[Value, Value] = {}
    taken: set[str] = set()
    for value in values:
        base = re.sub(r"_\d+$", "", value.name)
        name, n = base, 2
        while name in taken:
            name, n = f"{base}_{n}", n + 1
        taken.add(name)
        copies[value] = Value(name, value.type)
    return copies


def _inside(op: Op) -> list[Op]:
    return [inner for region in op.regions for inner in region.ops]
