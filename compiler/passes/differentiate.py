"""The backward pass as graphs: for every graph G of a program, one that gives its gradients.

`G_backward` reads what G keeps, takes the gradients of G's real results and gives those of its real
arguments; gradients of weights are accumulated on the way, by operators that nothing else needs, so
that they can be done later. Each operator says its own derivative (`Operator.grad`); this file runs
through a graph backwards and adds up. Everything that is needed is kept; `recompute` thinks better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compiler.graph.build import Builder
from compiler.graph.core import (
    BACKWARD,
    REPEATS,
    Attr,
    Graph,
    Op,
    Program,
    Region,
    Value,
    copy_program,
)
from compiler.graph.types import FLOATS, Type
from compiler.lower.contract import crossing
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.passes.outline import CALLS
from compiler.rewrite import Miss
from dsl.load import Description
from dsl.source import Span

Gradients = dict[Value, Value]
Moves = dict[str, set[int]]


class Underivable(Exception):
    """An operator whose derivative is not known, at this place."""

    def __init__(self, reason: str, op: Op) -> None:
        super().__init__(reason)
        self.miss = Miss(reason, op)


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if program.backward or not _minimised(program.main):
        return ()
    between = [op for op in program.main.ops[:-1] if op.kind not in CALLS]
    if between:
        return (Miss("stands between the layers, in no graph of its own", between[0]),)
    made = copy_program(program)
    try:
        _Derivation(made).run()
    except Underivable as error:
        return (error.miss,)
    program.graphs, program.backward = made.graphs, made.backward
    return ()


DIFFERENTIATE = Pass(
    "differentiate",
    "derive the gradients of every graph as a graph",
    _run,
    requires="outline: the outermost block holds nothing but calls",
    ensures="a backward graph for each graph, unless an operator has no derivative there",
)


class _Derivation:
    """All graphs of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.moves = _moving_results(program)
        self.wanted = _wanted_arguments(program, self.moves)
        self.made: dict[str, Graph] = {}

    def run(self) -> None:
        """Adds the backward graphs, each behind the graphs that it calls; or changes nothing."""
        forward = list(self.program.graphs.values())
        for graph in forward:
            self.made[graph.name] = _Backward(self, graph).derive()
        for graph in forward:
            _keep(graph, self.made[graph.name])
        self.program.graphs |= {g.name: g for g in self.made.values()}
        self.program.backward = self.program.root + BACKWARD


class _Backward:
    """The backward graph of one graph, while it is made."""

    def __init__(self, derivation: _Derivation, graph: Graph) -> None:
        self.derivation = derivation
        self.forward = graph
        self.backward = Graph(
            graph.name + BACKWARD,
            about=f"The gradients of {graph.name}.",
            span=graph.span,
        )
        # Weights by name are those of the forward graph until it is known which are needed.
        self.backward.weights = dict(graph.weights)
        callees = {g.name: g for g in derivation.made.values()}
        self.builder = Builder(self.backward, callees)
        # Values of the forward graph are read under their own names.
        self.builder.names |= Builder(graph, {}).names
        self.active = _active(graph, derivation.wanted[graph.name], derivation.moves)
        self.spans: tuple[Span, ...] = ()

    # ---- what derivatives of operators ask for (`Adjoint`) --------------------------------------

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        *,
        names: Sequence[str] = (),
        **attrs: Attr,
    ) -> list[Value]:
        return self.builder.add(
            kind, operands, symbols, names=names, regions=(), spans=self.spans, **attrs
        )

    def weight(self, symbol: str) -> Type:
        return self.forward.weights[symbol].type

    def wants(self, value: Value) -> bool:
        return value in self.active

    def trains(self, symbols: Sequence[str]) -> bool:
        return any(self.forward.weights[s].trainable for s in symbols)

    # ---- the graph ------------------------------------------------------------------------------

    def derive(self) -> Graph:
        graph = self.forward
        seeds = _seeds(graph, self.active)
        if graph.name == self.derivation.program.root:
            # What is minimised; other results of the outermost block are for people.
            seeds = [i for i in seeds if i in _minimised(graph)]
        given: Gradients = {}
        for i in seeds:
            result = graph.results[i]
            seed = Value(self.builder.unique(f"d_{graph.result_names[i]}"), result.type.whole)
            self.backward.args.append(seed)
            given[result] = seed
        gradients = dict(given)
        self._reverse(graph.ops[:-1], gradients)
        wanted = [
            i for i in self.derivation.wanted[graph.name] if graph.args[i].type.dtype in FLOATS
        ]
        outputs = [self._or_zeros(gradients.get(graph.args[i]), graph.args[i]) for i in wanted]
        # A gradient that is passed through has to be a value of its own for whoever reads it twice.
        ends = graph.ops[-1].spans
        self.backward.ops.append(Op("return", outputs, spans=ends))
        self.backward.result_names = tuple(graph.args[i].name for i in wanted)
        _drop_dead(self.backward)
        self._read_kept(seeds, wanted)
        used = {s for op in self.backward.walk() for s in op.symbols}
        self.backward.weights = {n: w for n, w in graph.weights.items() if n in used}
        return self.backward

    def _reverse(self, ops: Sequence[Op], gradients: Gradients) -> None:
        """Runs backwards through operators; `gradients` of values grow on the way."""
        for op in reversed(ops):
            self.spans = op.spans
            d = [gradients.get(v) for v in op.results]
            if op.kind == "call":
                self._call(op, d, gradients)
            elif op.kind in REPEATS:
                self._repeat(op, d, gradients)
            elif OPS[op.kind].differentiable and any(x is not None for x in d):
                self._one(op, d, gradients)

    def _one(self, op: Op, d: Sequence[Value | None], gradients: Gradients) -> None:
        if not (any(map(self.wants, op.operands)) or self.trains(op.symbols)):
            return
        saving = OPS[op.kind].saving
        if saving:
            _replace(op, saving, self.forward, self.derivation.program)
            d = [*d, *(None for _ in op.results[len(d) :])]
        try:
            found = OPS[op.kind].grad(self, op, d)
        except NotImplementedError:
            raise Underivable(f"{op.kind} has no derivative", op) from None
        for value, gradient in zip(op.operands, found, strict=True):
            if gradient is not None and self.wants(value):
                self._accumulate(gradients, value, gradient)

    def _accumulate(self, gradients: Gradients, value: Value, gradient: Value) -> None:
        before = gradients.get(value)
        if before is not None:
            (gradient,) = self.add("add", [before, gradient], names=[f"d_{value.name}"])
        gradients[value] = gradient

    def _or_zeros(self, gradient: Value | None, like: Value) -> Value:
        if gradient is not None:
            return gradient
        if not like.type.dims and like.type.dtype == "f32":
            return self.add("constant", names=["zero"], value=0.0)[0]
        return self.add("zeros_like", [like], names=["zeros"])[0]

    def _call(self, op: Op, d: Sequence[Value | None], gradients: Gradients) -> None:
        callee = str(op.attrs["callee"])
        backward = self.derivation.made[callee]
        kept = backward.ops[0]
        results, arguments = kept.attrs["results"], kept.attrs["arguments"]
        assert isinstance(results, tuple) and isinstance(arguments, tuple)
        forward = self.derivation.program.graphs[callee]
        operands = []
        for i in results:
            assert isinstance(i, int)
            # Several results may be one value of the callee: their gradients add up.
            same = [j for j, v in enumerate(forward.results) if v is forward.results[i]]
            parts = [x for x in (d[j] for j in same) if x is not None]
            total = parts[0] if parts else self._or_zeros(None, _alike(op.results[i], d))
            for part in parts[1:]:
                (total,) = self.add("add", [total, part], names=[f"d_{op.results[i].name}"])
            operands.append(total)
        scope = op.attrs["scope"]
        names = [f"d_{op.operands[i].name}" for i in arguments if isinstance(i, int)]
        found = self.add("call", operands, names=names, callee=backward.name, scope=scope)
        for i, gradient in zip(arguments, found, strict=True):
            assert isinstance(i, int)
            if self.wants(op.operands[i]):
                self._accumulate(gradients, op.operands[i], gradient)

    def _repeat(self, op: Op, d: Sequence[Value | None], gradients: Gradients) -> None:
        """Layers from the last to the first, the gradients of what is carried carried back."""
        if op.kind == "repeat_backward":
            raise Underivable("a gradient is not differentiated again", op)
        (region,) = op.regions
        carried = [i for i, v in enumerate(op.operands) if v in self.active]
        count = len(op.operands)
        stacked = [i for i in range(count, len(op.results)) if d[i] is not None]
        inside: Gradients = {}
        region_args = []
        for i in [*carried, *stacked]:
            yielded = region.yielded[i]
            arg = self.builder.value(f"d_{yielded.name}", yielded.type.whole)
            region_args.append(arg)
            if yielded in inside:
                raise Underivable(f"{yielded} is carried twice", op)
            inside[yielded] = arg
        outer, self.builder.ops = self.builder.ops, []
        made = set(region.args) | {v for inner in region.ops for v in inner.results}
        self._reverse(region.ops[:-1], inside)
        ends = [self._or_zeros(inside.get(region.args[i]), region.args[i]) for i in carried]
        ops, self.builder.ops = self.builder.ops, outer
        self._need_no_values(op, ops, made, inside)
        ops.append(Op("yield", ends, spans=op.spans))
        self.spans = op.spans
        first = [self._or_zeros(d[i], op.results[i]) for i in carried]
        found = self.builder.add(
            "repeat_backward",
            [*first, *(x for x in (d[i] for i in stacked) if x is not None)],
            spans=op.spans,
            names=[f"d_{op.operands[i].name}" for i in carried],
            regions=[Region(region_args, ops)],
            start=op.attrs["start"],
            count=op.attrs["count"],
            carried=len(carried),
        )
        for i, gradient in zip(carried, found, strict=True):
            self._accumulate(gradients, op.operands[i], gradient)

    def _need_no_values(
        self, op: Op, ops: Sequence[Op], made: set[Value], inside: Mapping[Value, Value]
    ) -> None:
        """What a loop holds besides calls has nowhere to be kept, layer by layer."""
        if any(v in made for inner in ops for v in inner.operands):
            raise Underivable("equations between the layers have no derivative in a loop", op)
        outside = [v for v in inside if v not in made and v in self.active]
        if outside:
            raise Underivable(f"layers read {outside[0]} from outside of their loop", op)

    def _read_kept(self, seeds: Sequence[int], wanted: Sequence[int]) -> None:
        """The first operator: what the backward graph reads of the forward graph."""
        own = {*self.backward.args, *(v for op in self.backward.walk() for v in op.results)}
        own |= {v for op in self.backward.walk() for r in op.regions for v in r.args}
        read = {v for op in self.backward.walk() for v in op.operands}
        needed = [v for v in in_order(self.forward) if v in read and v not in own]
        copies = {v: Value(v.name, v.type) for v in needed}
        for old, new in copies.items():
            self.backward.replace_uses(old, new)
        entries = tuple(v.name for v in needed)
        self.backward.kept = {v.name: v.type for v in needed}
        first = Op(
            "kept",
            attrs={"entries": entries, "results": tuple(seeds), "arguments": tuple(wanted)},
            results=list(copies.values()),
            spans=(self.forward.span,) if self.forward.span else self.forward.ops[-1].spans,
        )
        self.backward.ops.insert(0, first)


def in_order(graph: Graph) -> list[Value]:
    """Arguments and results of operators outside of regions, as they come into being."""
    return [*graph.args, *(v for op in graph.ops for v in op.results)]


def _alike(value: Value, gradients: Sequence[Value | None]) -> Value:
    """Something of the type of a value: a gradient, so that the value need not be kept for it."""
    return next((d for d in gradients if d is not None and d.type == value.type), value)


def _replace(op: Op, saving: Sequence[str], graph: Graph, program: Program) -> None:
    """Lets an operator compute what its derivative needs besides; its results stay."""
    builder = Builder(graph, program.graphs)
    builder.ops = []
    kind, *names = saving
    results = builder.add(
        kind,
        op.operands,
        op.symbols,
        names=[op.results[0].name, *names],
        regions=(),
        spans=op.spans,
        **op.attrs,
    )
    op.kind = kind
    op.results = [*op.results, *results[len(op.results) :]]


def _keep(graph: Graph, backward: Graph) -> None:
    """The last operator of a forward graph but one: it keeps what the backward graph reads."""
    if not backward.kept:
        return
    values = {v.name: v for op in graph.ops for v in op.results} | {v.name: v for v in graph.args}
    graph.kept = dict(backward.kept)
    entries = tuple(backward.kept)
    op = Op("keep", [values[n] for n in entries], attrs={"entries": entries})
    op.spans = graph.ops[-1].spans or ((graph.span,) if graph.span else ())
    graph.ops.insert(len(graph.ops) - 1, op)


def _minimised(main: Graph) -> list[int]:
    """The results of the outermost block that have a gradient, by number.

    What is minimised, and in a stage of a pipeline the states that the next one reads.
    """
    _, sent = crossing(main)
    return [i for i, name in enumerate(main.result_names) if name == "total" or i in sent]


def _seeds(graph: Graph, active: set[Value]) -> list[int]:
    """The results that have a gradient, by number; of equal ones the first."""
    seen: set[Value] = set()
    found = []
    for i, value in enumerate(graph.results):
        if value in active and value not in seen:
            found.append(i)
            seen.add(value)
    return found


def _active(graph: Graph, wanted: Sequence[int], moves: Moves) -> set[Value]:
    """Values that change with a weight or with a wanted argument."""
    active = {graph.args[i] for i in wanted}

    def results(op: Op) -> list[Value]:
        if op.kind == "call":
            callee = moves[str(op.attrs["callee"])]
            return [v for i, v in enumerate(op.results) if i in callee]
        if op.kind == "repeat":
            carried = len(op.operands)
            stacked = zip(op.results[carried:], op.regions[0].yielded[carried:], strict=True)
            return [*op.results[:carried], *(v for v, inner in stacked if inner in active)]
        reads = any(v in active for v in op.operands)
        trains = any(graph.weights[s].trainable for s in op.symbols)
        return op.results if (reads or trains) and OPS[op.kind].differentiable else []

    def visit(ops: Sequence[Op]) -> None:
        for op in ops:
            if op.kind == "repeat":
                region = op.regions[0]
                active.update(v for v in region.args if v.type.dtype in FLOATS)
                visit(region.ops)
            active.update(v for v in results(op) if v.type.dtype in FLOATS)

    visit(graph.ops)
    return active


def _moving_results(program: Program) -> Moves:
    """For each graph the results that change with its weights or real arguments, by number."""
    moves: Moves = {}
    for name, graph in program.graphs.items():  # callees stand before callers
        real = [i for i, v in enumerate(graph.args) if v.type.dtype in FLOATS]
        active = _active(graph, real, moves)
        moves[name] = {i for i, v in enumerate(graph.results) if v in active}
    return moves


def _wanted_arguments(program: Program, moves: Moves) -> dict[str, list[int]]:
    """For each graph the arguments that change with a weight in some call of it."""
    wanted: dict[str, set[int]] = {name: set() for name in program.graphs}
    # In a stage of a pipeline the states that the one before it gave.
    wanted[program.root] = set(crossing(program.main)[0])
    for name, graph in reversed(program.graphs.items()):  # callers stand behind their callees
        active = _active(graph, sorted(wanted[name]), moves)
        for op in graph.walk():
            if op.kind == "call":
                moved = {i for i, v in enumerate(op.operands) if v in active}
                wanted[str(op.attrs["callee"])] |= moved
    return {name: sorted(indices) for name, indices in wanted.items()}


def _drop_dead(graph: Graph) -> None:
    """Derivatives that nobody asked for, of operators that give several at once."""
    used = {v for op in graph.walk() for v in op.operands}
    for op in reversed(list(graph.ops)):
        if OPS[op.kind].pure and not op.regions and not any(v in used for v in op.results):
            graph.ops.remove(op)
            used = {v for o in graph.walk() for v in o.operands}
