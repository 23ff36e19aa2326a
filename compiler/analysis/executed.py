"""Every operator that one run of a graph executes, with what it reads, writes and computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from compiler.analysis.costs import Costs, repetitions
from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, sizes_inside
from compiler.graph.types import BYTES
from compiler.ops import OPS
from compiler.ops.base import CommBytes, Site

# What only names, frames or moves values between graphs.
_FREE = ("saved", "save", "return", "yield", "constant", "fp8_weight")


@dataclass(frozen=True)
class Executed:
    """`times` runs of an operator, each of `flops` products, `bytes` in memory and `moved` sent.

    A view, and what only frames others, has no bytes. `backward` is whether its graph is one of
    gradients. FP8 copies of weights are made once a step and are left out.
    """

    op: Op
    site: Site
    flops: int
    bytes: int
    moved: CommBytes
    times: int
    backward: bool


def executed(program: Program, graph: Graph, sizes: Mapping[str, int]) -> Iterator[Executed]:
    """In program order; `sizes` are those of the run-time dimensions of one micro-batch."""
    yield from _visit(program, Costs(program), graph, graph.ops, dict(sizes), 1)


def _visit(
    program: Program,
    costs: Costs,
    graph: Graph,
    ops: Sequence[Op],
    sizes: dict[str, int],
    runs: int,
) -> Iterator[Executed]:
    backward = program.saver_of(graph.name) is not None
    for op in ops:
        kind = OPS[op.kind]
        site = site_of(op, graph, program.graphs)
        inside = kind.inner_sizes(site, sizes)
        for region in op.regions:
            yield from _visit(
                program, costs, graph, region.ops, dict(inside), runs * repetitions(op)
            )
        after = {**sizes, **kind.sizes(site, sizes)}
        if op.kind == "saved":
            after = dict(costs.sizes_of_saved(graph, after))
        if op.callee:
            callee = program.graphs[op.callee]
            there = dict(sizes_inside(callee, op, sizes))
            yield from _visit(program, costs, callee, callee.ops, there, runs)
        elif op.kind not in _FREE and not op.regions:
            moved = kind.moved(site, sizes)
            size = 0 if kind.view else _bytes(op, graph, sizes, after)
            flops = max(0, kind.flops(site, sizes))
            yield Executed(op, site, flops, size, moved, runs, backward)
        sizes = after


def _bytes(op: Op, graph: Graph, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Of operands, results and weights, each once; a sum of gradients is read and written."""
    found = sum(v.type.bytes(before) for v in op.operands)
    found += sum(v.type.bytes(after) for v in op.results)
    if op.kind == "accumulate_grad":
        return found + 2 * BYTES["f32"] * op.operands[0].type.count(before)
    weights = (graph.weights[symbol] for symbol in op.symbols)
    return found + sum(w.stack * w.type.bytes({}) for w in weights)
