"""The end of a training step as a program of each rank: gradients summed, weights renewed.

Gradients of weights that all data ranks hold are reduced and scattered, so that each rank renews
its share, and the shares are gathered again (ZeRO-1, arXiv 1910.02054; DeepSeek-V3 report, section
3.2). Experts are there once in each replica, so that theirs are shared among the replicas only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Region, Weight
from compiler.graph.types import Dim
from compiler.ops.base import dims_attr
from compiler.parallel.layout import Layout, units
from compiler.passes.partition import group_attrs

# By convention the graph that ends a step is called so, behind the name of its forward graph.
SUFFIX = "_step"
# What results are called, after the weight.
NAMES = {
    "gradient": "d_{}",
    "recv": "d_{}_there",
    "add": "d_{}_of_stages",
    "reduce_scatter": "d_{}_share",
    "update": "{}_share",
}


def shared_weights(uncut: Program, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Weights of the outermost block, as the embedding, that several stages use, and which."""
    stages: dict[str, set[int]] = {}
    found = iter(units(uncut.main))
    for stage in layout.stages:
        for _, unit in zip(stage.units, found, strict=False):
            for op in uncut.main.ops[unit.ops.start : unit.ops.stop]:
                for name in op.symbols:
                    stages.setdefault(name, set()).add(stage.index)
    return {name: tuple(sorted(at)) for name, at in stages.items() if len(at) > 1}


def step_program(
    program: Program, layout: Layout, stage: int, shared: Mapping[str, tuple[int, ...]]
) -> Program:
    """The program that ends a training step on the ranks whose forward program is given."""
    made = Program(program.name, program.root + SUFFIX)
    for name, graph in program.graphs.items():
        if program.forward_of(name) != name:
            continue
        step = _Step(graph, program, made, layout, stage, shared).graph
        if len(step.ops) > 1 or name == program.root:
            made.graphs[step.name] = step
            made.steps[name] = step.name
    # The block updates the weights of its parts, which share its scope.
    used = {made.root, *(c for graph in made.graphs.values() for c in graph.calls())}
    made.graphs = {name: graph for name, graph in made.graphs.items() if name in used}
    made.steps = {name: step for name, step in made.steps.items() if step in used}
    return made


class _Step:
    """The end of a step for the weights of one graph and of those that it calls."""

    def __init__(
        self,
        graph: Graph,
        program: Program,
        made: Program,
        layout: Layout,
        stage: int,
        shared: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.layout, self.stage, self.shared = layout, stage, shared
        self.forward, self.program, self.made = graph, program, made
        about = f"The end of a training step for the weights of {graph.name}."
        self.graph = Graph(graph.name + SUFFIX, about=about, span=graph.span)
        self.builder = Builder(self.graph, made.graphs)
        for name, weight in self._weights(graph).items():
            if weight.trainable and self._is_first(name):
                self._renew(name, weight)
        self.builder.ops += self._calls(graph.ops)
        self.graph.ops.append(Op("return", spans=graph.ops[-1].spans))

    def _weights(self, graph: Graph) -> dict[str, Weight]:
        """Those of a graph and of its parts, which are called under no scope of their own."""
        found = dict(graph.weights)
        for op in graph.ops:
            if op.kind == "call" and not op.attrs["scope"]:
                found |= self._weights(self.program.graphs[str(op.attrs["callee"])])
        return found

    def _add(self, kind: str, *operands: Any, weight: str = "", **attrs: Any) -> Any:
        names = [NAMES.get(kind, "{}").format(weight.removesuffix(".weight").rpartition(".")[2])]
        symbols = [weight] if kind in ("gradient", "update", "assign") else []
        spans = self.forward.ops[-1].spans
        made = self.builder.add(kind, operands, symbols, names=names, spans=spans, **attrs)
        return made[0] if made else None

    def _renew(self, name: str, weight: Weight) -> None:
        self.graph.weights[name] = weight
        mesh = self.layout.mesh
        own = (Dim("experts", weight.stack),) if "*" in name else ()
        experts = {"experts": dims_attr(*own)}
        over = (weight.axis,) if weight.axis else ()
        axes = tuple(axis for axis in self.layout.gradient_axes if axis not in over)
        d = self._add("gradient", weight=name, **experts, over=over, axes=axes)
        here, sharing = self._rank(self.stage), sorted(set(map(self._rank, self._stages(name))))
        for other in sharing:
            if other != here:
                self._add("send", d, pipeline=other)
        total = None
        for other in sharing:
            # In the order of the ranks, so that all of them get the same sum.
            part = d
            if other != here:
                part = self._add("recv", weight=name, pipeline=other, type=str(d.type))
            total = part if total is None else self._add("add", total, part, weight=name)
        d = total
        group = group_attrs(mesh, axes, mesh.rank(here, 0, 0)) if axes else {}
        if axes:
            d = self._add("reduce_scatter", d, weight=name, **group)
        sizes = {"axes": axes, "ranks": group.get("ranks", 1)}
        new = self._add("update", d, weight=name, **experts, **sizes)
        if axes:
            into = dims_attr(*own, *weight.type.dims)
            new = self._add("all_gather", new, weight=name, **group, into=into)
        self._add("assign", new, weight=name, **experts)

    def _rank(self, stage: int) -> int:
        """The first pipeline rank that holds a stage."""
        return min(self.layout.holders(stage))

    def _stages(self, name: str) -> tuple[int, ...]:
        """Those that use a weight."""
        return self.shared.get(name, (self.stage,))

    def _is_first(self, name: str) -> bool:
        """Whether no earlier stage on the same rank uses a weight, which is one tensor there."""
        rank = self._rank(self.stage)
        return self.stage == min(s for s in self._stages(name) if self._rank(s) == rank)

    def _calls(self, ops: list[Op]) -> list[Op]:
        found: list[Op] = []
        for op in ops:
            if op.kind == "call" and op.attrs["scope"]:
                callee = self.made.steps.get(str(op.attrs["callee"]))
                if callee:
                    attrs = {"callee": callee, "scope": op.attrs["scope"]}
                    found.append(Op("call", attrs=attrs, spans=op.spans))
            elif op.kind == "repeat":
                inside = self._calls(op.regions[0].ops)
                if inside:
                    inside.append(Op("yield", spans=op.spans))
                    region = Region([], inside)
                    found.append(
                        Op("repeat", attrs=dict(op.attrs), regions=[region], spans=op.spans)
                    )
        return found
