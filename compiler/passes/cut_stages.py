"""The program of one pipeline stage: its layers, and what passes between it and its neighbours.

The outermost graph is cut between layers. What crosses a cut (the states `h`) becomes a result of
the previous stage and an argument of the next one; `Program.boundary` lists it, and a schedule
(`compiler/plan/schedule.py`) says when and between which ranks it is sent. What depends on the
arguments alone, as the rotary table, each stage computes itself. A sum over all layers, as the
balance loss, is a sum over the stages: each holds its own terms of it. DeepSeek-V3 report, section
3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.build import Builder
from compiler.graph.core import Boundary, Op, Program, Value, walk
from compiler.graph.names import is_weight, names_of
from compiler.graph.types import Dim
from compiler.ops import OPS
from compiler.parallel.layout import Layout, units
from compiler.passes.base import Pass
from compiler.passes.simplify import SIMPLIFY
from compiler.rewrite import Miss
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description


def cut_stages(layout: Layout, stage: int) -> Pass:
    """Leaves of a program what one stage of the pipeline computes."""

    def run(program: Program, description: Description) -> Sequence[Miss]:
        if len(layout.stages) > 1:
            _Cut(program, layout).keep(stage)
            SIMPLIFY.run(program, description)
            names = {name: names_of(graph) for name, graph in program.graphs.items()}
            program.aliases = {
                copy: original
                for copy, original in program.aliases.items()
                if is_weight(original, program.root, names)
            }
        return ()

    return Pass(
        "cut_stages",
        "the layers of one pipeline stage",
        run,
        requires="simplify; layers as a repeat of the outermost block",
        ensures="states that cross a cut are arguments and results, and the boundary lists them",
        essential=True,
    )


class _Cut:
    """The outermost graph, and where each part of it is computed.

    Between the layers of a `repeat` its results stand for what is carried so far.
    """

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program, self.main = program, program.main
        self.stages = len(layout.stages)
        # Where each operator is computed: a stage for each layer of a repeat.
        self.places: dict[int, dict[int | None, int]] = {}
        found = iter(units(self.main))
        for stage in layout.stages:
            for _, unit in zip(stage.units, found, strict=False):
                for i in unit.ops:
                    self.places.setdefault(i, {})[unit.layer] = stage.index
        self.common = set(self.main.args)
        self.terms: set[Value] = set()
        for op in self.main.ops[:-1]:
            self._classify(op)

    def _classify(self, op: Op) -> None:
        """`common` are values that every stage has, `terms` those of which each has its own."""
        if op.kind == "repeat":
            self.terms.update(op.results[len(op.operands) :])
        elif self.terms & set(op.operands):
            if not OPS[op.kind].termwise or (op.kind == "div" and op.operands[1] in self.terms):
                self._refuse(op, f"{op.kind} of what the layers of several stages make together")
            self.terms.update(op.results)
        elif OPS[op.kind].pure and not op.symbols and self.common >= set(op.operands):
            self.common.update(op.results)

    def _refuse(self, op: Op, reason: str) -> None:
        help = "use sums and products with numbers only, or `pipeline: 1`"
        span = op.spans[0] if op.spans else self.main.span
        raise DiagnosticError([Diagnostic("E519", reason, span, "across stages", help=help)])

    def _reads(self, op: Op, stage: int) -> list[Value]:
        """What a stage needs for its part of an operator, from wherever."""
        inside = {v for o in walk([op]) for v in o.results}
        inside |= {v for o in walk([op]) for r in o.regions for v in r.args}
        free = [v for r in op.regions for o in walk(r.ops) for v in o.operands if v not in inside]
        first = op.operands
        if op.kind == "repeat" and self._layers(op, stage)[0] != op.number("start"):
            first = op.results[: len(op.operands)]
        return [v for v in (*first, *free) if v not in self.common and v not in self.terms]

    def _layers(self, op: Op, stage: int) -> list[int]:
        places = self.places[self.main.ops.index(op)]
        return [n for n, at in places.items() if at == stage and n is not None]

    def _entering(self, stage: int) -> list[Value]:
        """What comes from the stage before: read here or further on, and made further back."""
        needed: dict[Value, None] = {}
        for at in range(self.stages - 1, stage - 1, -1):
            for op in reversed(self._own(at)):
                made = op.results[: len(op.operands)] if op.kind == "repeat" else op.results
                for value in made:
                    needed.pop(value, None)
                needed |= dict.fromkeys(self._reads(op, at))
        return list(needed)

    def _own(self, stage: int) -> list[Op]:
        ops = enumerate(self.main.ops[:-1])
        return [op for i, op in ops if stage in self.places[i].values()]

    def keep(self, stage: int) -> None:
        """Cuts the graph down to one stage."""
        main, builder = self.main, Builder(self.main, self.program.graphs)
        own, entering = self._own(stage), self._entering(stage)
        leaving = self._entering(stage + 1)
        here = {v: v for v in main.args}
        for value in entering:
            here[value] = builder.value(f"{value.name}_in", value.type)
        received = [here[v] for v in entering]
        parts = {op: self._layers(op, stage) for op in own if op.kind == "repeat"}
        kept: list[Op] = []
        for op in main.ops[:-1]:
            if self.terms & set(op.operands):
                kept += self._terms_of(op, here, op in own)
            elif op in own or set(op.results) <= self.common:
                if op.kind == "repeat":
                    self._part(op, parts[op], here)
                _read(op, here)
                here.update((v, v) for v in op.results)
                kept.append(op)
        end = main.ops[-1]
        # Of what every stage has, the last one gives it.
        last = self.common if stage < self.stages - 1 else set()
        results = [
            (name, here[v])
            for name, v in zip(main.result_names, end.operands, strict=True)
            if v in here and v not in last and v not in entering
        ]
        sent = [(v.name, here[v]) for v in leaving]
        self.program.boundary = Boundary(
            tuple(v.name for v in received), tuple(name for name, _ in sent)
        )
        main.args += received
        main.result_names = tuple(name for name, _ in [*results, *sent])
        end.operands = [v for _, v in [*results, *sent]]
        main.ops = [*kept, end]

    def _part(self, op: Op, layers: Sequence[int], here: dict[Value, Value]) -> None:
        """The layers of a repeat that belong to this stage."""
        count = len(op.operands)
        if layers[0] != op.number("start"):
            op.operands = [here[v] for v in op.results[:count]]
        op.attrs |= {"start": layers[0], "count": len(layers)}
        for value in op.results[count:]:
            _, *rest = value.type.dims
            value.type = value.type.with_dims(Dim("layer", len(layers)), *rest)

    def _terms_of(self, op: Op, here: dict[Value, Value], own: bool) -> list[Op]:
        """This stage's terms of a sum over stages: without those that others have."""
        if op.kind == "add":
            # What is no sum over stages counts once, where it is made.
            present = [v for v in op.operands if v in here and (own or v in self.terms)]
        else:
            first, *others = sorted(op.operands, key=lambda v: v not in self.terms)
            if not self.common.issuperset(others):
                self._refuse(op, f"{op.kind} by what not every stage has")
            present = op.operands if first in here else []
        if len(present) < len(op.operands):
            here.update((op.result, here[v]) for v in present)
            return []
        op.operands = [here[v] for v in present]
        here[op.result] = op.result
        return [op]


def _read(op: Op, here: dict[Value, Value]) -> None:
    for inner in walk([op]):
        inner.operands = [here.get(v, v) for v in inner.operands]
