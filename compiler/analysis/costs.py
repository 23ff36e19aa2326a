"""What each operator of a program costs: arithmetic and bytes of results, at given sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.graph.build import site_of
from compiler.graph.core import REPEATS, Graph, Op, Program, sizes_inside
from compiler.ops import OPS

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """FLOPs of one run of an operator with all that it holds or calls, and bytes of its results.

    FLOPs count as in `summary.CONVENTIONS`: a multiply-add as two, matrix products and attention.
    """

    flops: int
    bytes: int


class Costs:
    """The costs of one program. Blocks that are called with the same sizes are looked at once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._flops: dict[tuple[str, tuple[tuple[str, int], ...]], int] = {}

    def of(self, graph: Graph, sizes: Sizes) -> dict[Op, Cost]:
        """Of every operator of a graph, those in regions included, whose sizes are of one run."""
        costs: dict[Op, Cost] = {}
        self._visit(graph, graph.ops, sizes, costs)
        return costs

    def flops(self, graph: Graph, sizes: Sizes) -> int:
        """Of one run of a graph."""
        key = (graph.name, tuple(sorted(sizes.items())))
        if key not in self._flops:
            costs: dict[Op, Cost] = {}
            self._flops[key] = self._visit(graph, graph.ops, sizes, costs)
        return self._flops[key]

    def runs(self) -> dict[str, int]:
        """How often one run of the program runs each of its graphs."""
        runs = dict.fromkeys(self._program.graphs, 0)
        runs |= dict.fromkeys(self._program.roots, 1)
        # Callers stand after callees.
        for graph in reversed(self._program.graphs.values()):
            self._count(graph.ops, runs[graph.name], runs)
        return runs

    def _count(self, ops: Sequence[Op], times: int, runs: dict[str, int]) -> None:
        for op in ops:
            if op.callee:
                runs[op.callee] += times
            for region in op.regions:
                self._count(region.ops, times * repetitions(op), runs)

    def _visit(self, graph: Graph, ops: Sequence[Op], sizes: Sizes, costs: dict[Op, Cost]) -> int:
        """Fills in `costs`; the sum of all FLOPs."""
        total = 0
        for op in ops:
            site = site_of(op, graph, self._program.graphs)
            flops = max(0, OPS[op.kind].flops(site, sizes))
            inside = OPS[op.kind].inner_sizes(site, sizes)
            for region in op.regions:
                flops += repetitions(op) * self._visit(graph, region.ops, inside, costs)
            if op.callee:
                callee = self._program.graphs[op.callee]
                flops += self.flops(callee, sizes_inside(callee, op, sizes))
            sizes = {**sizes, **OPS[op.kind].sizes(site, sizes)}
            if op.kind == "saved":
                sizes = self.sizes_of_saved(graph, sizes)
            costs[op] = Cost(flops, sum(v.type.bytes(sizes) for v in op.results))
            total += flops
        return total

    def sizes_of_saved(self, graph: Graph, sizes: Sizes) -> Sizes:
        """With those that the graphs bring about whose values a graph of gradients reads."""
        saver = self._program.saver_of(graph.name)
        if saver is None:
            return sizes
        return known_sizes(saver, self._program, self.sizes_of_saved(saver, sizes))


def known_sizes(graph: Graph, program: Program, sizes: Sizes) -> dict[str, int]:
    """`sizes`, and those of the run-time dimensions that the operators of a graph bring about."""
    known = dict(sizes)
    for op in graph.ops:
        known |= OPS[op.kind].sizes(site_of(op, graph, program.graphs), known)
    return known


def repetitions(op: Op) -> int:
    return op.number("count") if op.kind in REPEATS else 1
