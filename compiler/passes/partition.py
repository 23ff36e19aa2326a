"""The program of one rank: tokens spread over data ranks, experts over expert ranks.

Every rank runs the same graphs on sequences of its own. Around the experts tokens are dispatched to
the ranks that hold them and combined again; what is a sum over all ranks' tokens is reduced where
somebody needs the whole. The ranks of a pipeline stage differ in nothing but their place in the
mesh, so that one program serves them all. Results are sums: those of all ranks and micro-batches
add up to what a step gives. DeepSeek-V3 report, sections 2.1.2 and 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from compiler.graph.build import Builder, infer
from compiler.graph.core import Graph, Op, Program, Region, Value
from compiler.graph.types import Type
from compiler.ops.base import PartialSum
from compiler.ops.loss import MEANS
from compiler.parallel.layout import Layout, router_of
from compiler.parallel.mesh import Mesh
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description


def partition(layout: Layout) -> Pass:
    """Spreads a program over the data ranks of a mesh."""

    def run(program: Program, description: Description) -> Sequence[Miss]:
        if layout.mesh.data * layout.micro_batches > 1:
            for graph in program.graphs.values():
                _Sharder(graph, program, layout).run()
        return ()

    return Pass(
        "partition",
        "sequences over data ranks, experts over expert ranks, and the collectives between them",
        run,
        requires="experts as a region",
        ensures="types say what is spread; whole tensors wherever an operator needs them",
        essential=True,
    )


class _Sharder:
    """One graph; those that it calls are spread already."""

    def __init__(self, graph: Graph, program: Program, layout: Layout) -> None:
        self.graph, self.program = graph, program
        self.layout, self.mesh = layout, layout.mesh
        self.builder = Builder(graph, program.graphs)
        self.producers = graph.producers()

    def run(self) -> None:
        for value in self.graph.args:
            value.type = self._local_batch(value.type)
        self._ops(self.graph.ops, {})

    def _local_batch(self, type: Type) -> Type:
        """The type on one data rank, which has a part of the batch."""
        axes = self.mesh.data_axes
        spread = (d._replace(axes=axes) if d.name == "batch" else d for d in type.dims)
        return type.with_dims(*spread)

    def _ops(self, ops: list[Op], reduced: dict[Value, Value]) -> None:
        """Types again, from the operands on; `reduced` are the sums that have been made already."""
        self.builder.ops, old = [], list(ops)
        for op in old:
            self._op(op, reduced)
        ops[:] = self.builder.ops

    def _op(self, op: Op, reduced: dict[Value, Value]) -> None:
        self._regions(op, reduced)
        assert op.kind != "permute", "experts are spread as a region, before they are fused"
        if op.kind == "experts" and self.mesh.expert > 1:
            self._experts(op)
            return
        types = self._types(op, reduced)
        for value, type in zip(op.results, types, strict=True):
            value.type = type
        self.builder.ops.append(op)
        if op.kind in MEANS:
            # A mean over the sequences of a micro-batch: all micro-batches have equally many.
            name, parts = op.result.name, self.mesh.data * self.layout.micro_batches
            op.result.name = self.builder.unique(f"{name}_of_rank")
            self.builder.names.discard(name)
            (mean,) = self._add(op, "scale", [op.result], [name], by=1 / parts)
            self._replace(op.result, mean)

    def _types(self, op: Op, reduced: dict[Value, Value]) -> tuple[Type, ...]:
        """Types of results; an operand that must be whole is reduced first."""
        while True:
            try:
                return infer(op, self.graph, self.program.graphs)
            except PartialSum as error:
                assert error.operand is not None
                operand = op.operands[error.operand]
                if operand not in reduced:
                    reduced[operand] = self._reduce(op, operand)
                op.operands[error.operand] = reduced[operand]

    def _reduce(self, op: Op, value: Value) -> Value:
        group = group_attrs(self.mesh, value.type.partial)
        return self._add(op, "all_reduce", [value], [f"all_{value.name}"], **group)[0]

    def _regions(self, op: Op, reduced: dict[Value, Value]) -> None:
        outer = self.builder.ops
        for region in op.regions:
            if op.kind == "repeat":
                for value, operand in zip(region.args, op.operands, strict=True):
                    value.type = operand.type
            self._ops(region.ops, dict(reduced))
        self.builder.ops = outer

    def _experts(self, op: Op) -> None:
        """Tokens to the ranks of their experts, and what the experts make of them back."""
        x, topk_indices, weight = op.operands
        count, ranks = op.number("count"), self.mesh.expert
        sizes: dict[str, Any] = {
            "count": count,
            "ranks": ranks,
            "nodes": group_attrs(self.mesh, ("expert",))["nodes"],
            "limit": self.layout.nodes_of_token(
                router_of(self.producers, topk_indices), topk_indices.type.last.size or 1, count
            ),
            **{name: n for name, n in op.attrs.items() if name == "identity"},
        }
        names = ["arrived", "arrived_weight", "arrived_route", "handle"]
        *there, handle = self._add(op, "dispatch", [x, weight, topk_indices], names, **sizes)
        rows, weights, routes = there
        for inner in op.regions[0].ops:
            for name in inner.symbols:
                self._own_experts(name, count // ranks)
        name = op.result.name
        self.builder.names.discard(name)
        (y,) = self._add(
            op, "experts", [rows, routes, weights], [f"arrived_{name}"],
            regions=op.regions, count=count // ranks,
        )  # fmt: skip
        (back,) = self._add(op, "combine", [y, handle, topk_indices], [name], **sizes)
        self._replace(op.result, back)

    def _own_experts(self, name: str, count: int) -> None:
        weight = self.graph.weights[name]
        if "*" in name:
            self.graph.weights[name] = replace(weight, stack=count, axis="expert")

    def _add(
        self,
        op: Op,
        kind: str,
        operands: Sequence[Value],
        names: Sequence[str],
        regions: Sequence[Region] = (),
        **attrs: Any,
    ) -> list[Value]:
        """An operator that comes from where `op` does."""
        return self.builder.add(
            kind, operands, names=names, regions=regions, spans=op.spans, **attrs
        )

    def _replace(self, old: Value, new: Value) -> None:
        """Whoever reads `old` later on reads `new`; what has been built already stays."""
        built = {id(op) for op in self.builder.ops}
        for op in self.graph.walk():
            if id(op) not in built:
                op.operands = [new if v is old else v for v in op.operands]


@cache
def group_attrs(mesh: Mesh, axes: tuple[str, ...], rank: int = 0) -> Mapping[str, Any]:
    """What a collective says of the ranks that it joins, of which `rank` is one."""
    group = mesh.group(rank, axes)
    return {"axes": axes, "ranks": len(group), "nodes": len({mesh.node(one) for one in group})}
