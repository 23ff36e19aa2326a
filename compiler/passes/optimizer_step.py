"""The end of a training step as a program of each rank: gradients summed, weights updated.

Gradients of weights that all data ranks hold are reduced and scattered, so that each rank updates
its share, and the shares are gathered again (ZeRO-1, arXiv 1910.02054; DeepSeek-V3 report, section
3.2). Experts are there once in each replica, so that theirs are shared among the replicas only.

There are two phases, since the norm that gradients are clipped by is one of all weights: `reduce`
gives the sum of the squares of what a rank has of the sums, each element once on all ranks
together, and `update` takes the factor that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Graph, Op, Program, Region, Step, Value, Weight
from compiler.graph.types import Dim, Type
from compiler.ops.base import dims_attr, module_of
from compiler.parallel.layout import Layout, units
from compiler.passes.differentiate import save
from compiler.passes.partition import group_attrs

# By convention the suffixes of the graphs that end a step, after the name of their forward graph.
REDUCE, UPDATE = "_reduce", "_update"
# What results are called, after the weight.
NAMES = {
    "gradient": "d_{}",
    "recv": "d_{}_there",
    "add": "d_{}_of_stages",
    "reduce_scatter": "d_{}_share",
    "sum_squares": "{}_squares",
    "update": "{}_share",
}

OF_WEIGHTS = ("gradient", "update", "assign", "quantize_weight")


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
    made = Program(program.name, program.root + REDUCE)
    for name, graph in program.graphs.items():
        if program.forward_of(name) == name:
            end = _Step(graph, program, made, layout, stage, shared)
            if end.updates or name == program.root:
                made.steps[name] = Step(end.reduce.name, end.update.name)
                made.graphs |= {one.name: one for one in (end.reduce, end.update)}
    # The block updates the weights of its parts, which share its scope.
    used = {*made.roots, *(c for graph in made.graphs.values() for c in graph.calls())}
    made.graphs = {name: graph for name, graph in made.graphs.items() if name in used}
    made.steps = {name: step for name, step in made.steps.items() if step.reduce in used}
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
        self.spans = graph.ops[-1].spans
        weights = f"for the weights of {graph.name}."
        self.reduce = Graph(graph.name + REDUCE, about=f"Gradients summed {weights}")
        self.update = Graph(graph.name + UPDATE, about=f"New values {weights}")
        self.reduce.span = self.update.span = graph.span
        self.factor = Value("factor", Type("f32"))
        self.update.args = [self.factor]
        self.reducing = Builder(self.reduce, made.graphs)
        self.updating = Builder(self.update, made.graphs)
        self.squares: list[Value] = []
        saved = {
            name: self._reduce(name, weight)
            for name, weight in self._weights(graph).items()
            if weight.trainable and self._is_first(name)
        }
        read = {name: Value(value.name, value.type) for name, value in saved.items()}
        if saved:
            self.update.ops.append(Op("saved", results=list(read.values()), spans=self.spans))
        for name, d in read.items():
            self._update(name, d)
        self.squares += self._calls(self.reducing, graph.ops)
        self._calls(self.updating, graph.ops, self.factor)
        self.updates = bool(self.update.ops)
        total = self._total(self.reducing, self.squares)
        self.reduce.ops.append(Op("return", total, spans=self.spans))
        self.reduce.result_names = ("squares",) * len(total)
        self.update.ops.append(Op("return", spans=self.spans))
        save(self.reduce, list(saved.values()))

    def _weights(self, graph: Graph) -> dict[str, Weight]:
        """Those of a graph and of its parts, which are called under no scope of their own."""
        found = dict(graph.weights)
        for op in graph.ops:
            if op.callee and not op.attrs["scope"]:
                found |= self._weights(self.program.graphs[op.callee])
        return found

    def _add(
        self, builder: Builder, kind: str, *operands: Value, weight: str = "", **attrs: Any
    ) -> list[Value]:
        module = module_of(weight)
        names = [NAMES.get(kind, "{}").format(module) if module else "squares"]
        symbols = [weight] if kind in OF_WEIGHTS else []
        return builder.add(kind, operands, symbols, names=names, spans=self.spans, **attrs)

    def _reduce(self, name: str, weight: Weight) -> Value:
        """What this rank has of the gradient, summed over all that hold the weight."""
        builder, mesh = self.reducing, self.layout.mesh
        self.reduce.weights[name] = weight
        over = (weight.axis,) if weight.axis else ()
        axes = self._axes(weight)
        attrs: dict[str, Any] = {"experts": _experts(name, weight), "over": over, "axes": axes}
        (d,) = self._add(builder, "gradient", weight=name, **attrs)
        here, sharing = self._rank(self.stage), sorted(set(map(self._rank, self._stages(name))))
        for other in sharing:
            if other != here:
                self._add(builder, "send", d, pipeline=other)
        parts = []
        for other in sharing:
            part = [d]
            if other != here:
                attrs = {"pipeline": other, "type": str(d.type)}
                part = self._add(builder, "recv", weight=name, **attrs)
            parts += part
        # In the order of the ranks, so that all of them get the same sum.
        (d,) = self._total(builder, parts, name)
        if axes:
            group = group_attrs(mesh, axes, mesh.rank(here, 0, 0))
            (d,) = self._add(builder, "reduce_scatter", d, weight=name, **group)
        if here == sharing[0]:  # the others have the same elements
            self.squares += self._add(builder, "sum_squares", d, weight=name)
        return d

    def _total(self, builder: Builder, parts: Sequence[Value], name: str = "") -> list[Value]:
        """The sum of values; nothing of nothing."""
        total = list(parts[:1])
        for part in parts[1:]:
            total = self._add(builder, "add", *total, part, weight=name)
        return total

    def _update(self, name: str, d: Value) -> None:
        weight, mesh = self.reduce.weights[name], self.layout.mesh
        builder, axes, experts = self.updating, self._axes(weight), _experts(name, weight)
        self.update.weights[name] = weight
        group: Mapping[str, Any] = {"ranks": 1}
        if axes:
            group = group_attrs(mesh, axes, mesh.rank(self._rank(self.stage), 0, 0))
        sizes = {"experts": experts, "axes": axes, "ranks": group["ranks"]}
        (new,) = self._add(builder, "update", d, self.factor, weight=name, **sizes)
        if axes:
            into = (*experts, *dims_attr(*weight.type.dims))
            (new,) = self._add(builder, "all_gather", new, weight=name, **group, into=into)
        self._add(builder, "assign", new, weight=name, experts=experts)
        if weight.fp8:
            scale = weight.fp8_scale
            self._add(builder, "quantize_weight", weight=name, scale=scale, experts=experts)

    def _axes(self, weight: Weight) -> tuple[str, ...]:
        """The axes of the ranks that hold the same elements of a weight."""
        return tuple(axis for axis in self.layout.gradient_axes if axis != weight.axis)

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

    def _calls(self, builder: Builder, ops: Sequence[Op], *operands: Value) -> list[Value]:
        """One phase of everything that operators call; the squares that it gives."""
        squares: list[Value] = []
        for op in ops:
            given: dict[str, Any] = {"names": ["squares"], "spans": op.spans}
            attrs: dict[str, Any] = dict(op.attrs)
            # Without a scope it is a part of this block, which updates its weights itself.
            if op.callee in self.made.steps and attrs["scope"]:
                step = self.made.steps[op.callee]
                attrs["callee"] = step.reduce if builder is self.reducing else step.update
                squares += builder.add("call", operands, **given, **attrs)
            elif op.kind == "repeat":
                inside: list[Op] = []
                with builder.into(inside):
                    given_inside = self._calls(builder, op.regions[0].ops, *operands)
                    total = self._total(builder, given_inside)
                if inside:
                    regions = [Region([], [*inside, Op("yield", total, spans=op.spans)])]
                    stacked = builder.add("repeat", regions=regions, **given, **attrs)
                    squares += [v for x in stacked for v in builder.add("sum", [x], **given)]
        return squares


def _experts(name: str, weight: Weight) -> tuple[Attr, ...]:
    """The experts of a rank, as a dimension of what is of all of them at once."""
    return dims_attr(Dim("experts", weight.stack)) if "*" in name else ()
