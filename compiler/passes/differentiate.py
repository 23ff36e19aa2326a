"""The backward pass as graphs: for every graph G of a program, one that gives its gradients.

It reads what G saves, takes the gradients of G's real results and gives those of its real
arguments; gradients of weights are accumulated on the way, by operators that nothing else needs, so
that they can be done later. Each operator says its own derivative (`Operator.grad`); this file runs
through a graph backwards and adds up. Everything that is needed is saved; `recompute` drops some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from compiler.graph.build import Builder, value_names
from compiler.graph.core import (
    REPEATS,
    Attr,
    Derivative,
    Graph,
    Op,
    Program,
    Region,
    Value,
    copy_program,
    list_of,
)
from compiler.graph.types import FLOATS, Type
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description
from dsl.source import Span

# By convention the suffix of a graph of gradients, after the name of its forward graph.
SUFFIX = "_backward"

Gradients = dict[Value, Value]
# By graph, the arguments or results that require a gradient, by number.
RequiresGrad = dict[str, set[int]]


class NotDifferentiable(Exception):
    """An operator whose derivative is not known, at this place."""

    def __init__(self, reason: str, op: Op) -> None:
        super().__init__(reason)
        self.miss = Miss(reason, op)


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if program.backward or not _loss_outputs(program):
        return ()
    between = [op for op in program.main.ops[:-1] if not OPS[op.kind].calls]
    if between:
        return (Miss("lies between the layers, in no graph of its own", between[0]),)
    made = copy_program(program)
    try:
        _Derivation(made).run()
    except NotDifferentiable as error:
        return (error.miss,)
    program.graphs, program.derivatives = made.graphs, made.derivatives
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
        self.results = _results_requiring_grad(program)
        self.arguments = _arguments_requiring_grad(program, self.results)
        self.made: dict[str, Graph] = {}

    def run(self) -> None:
        """Adds the backward graphs, each after the graphs that it calls; or changes nothing."""
        program = self.program
        forward = list(program.graphs.values())
        for graph in forward:
            made = _Backward(self, graph)
            program.derivatives[graph.name] = made.derive()
            self.made[graph.name] = made.backward
        for graph in forward:
            values = {v.name: v for v in in_order(graph)}
            save(graph, [values[v.name] for v in self.made[graph.name].ops[0].results])
        program.graphs |= {g.name: g for g in self.made.values()}


class _Backward:
    """The backward graph of one graph, while it is made."""

    def __init__(self, derivation: _Derivation, graph: Graph) -> None:
        self.derivation = derivation
        self.forward = graph
        self.backward = Graph(
            graph.name + SUFFIX,
            about=f"The gradients of {graph.name}.",
            span=graph.span,
        )
        # Weights by name are those of the forward graph until it is known which are needed.
        self.backward.weights = dict(graph.weights)
        callees = {g.name: g for g in derivation.made.values()}
        self.builder = Builder(self.backward, callees)
        # Values of the forward graph are read under their own names.
        self.builder.names |= value_names(graph)
        arguments = derivation.arguments[graph.name]
        self.requires_grad = _requires_grad(graph, arguments, derivation.results)
        self.spans: tuple[Span, ...] = ()

    # ---- what derivatives of operators ask for (`Adjoint`) --------------------------------------

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        /,
        *,
        names: Sequence[str] = (),
        **attrs: Attr,
    ) -> list[Value]:
        return self.builder.add(
            kind, operands, symbols, names=names, regions=(), spans=self.spans, **attrs
        )

    def weight(self, symbol: str) -> Type:
        return self.forward.weights[symbol].type

    def needs_grad(self, value: Value) -> bool:
        return value in self.requires_grad

    def trainable(self, symbols: Sequence[str]) -> bool:
        return any(self.forward.weights[s].trainable for s in symbols)

    # ---- the graph ------------------------------------------------------------------------------

    def derive(self) -> Derivative:
        """Fills in `backward`; what corresponds between it and the forward graph."""
        graph = self.forward
        seeds = _seeds(graph, self.requires_grad)
        if graph.name == self.derivation.program.root:
            # Other results of the outermost block are reported, not minimized.
            seeds = [i for i in seeds if i in _loss_outputs(self.derivation.program)]
        given: Gradients = {}
        for i in seeds:
            result = graph.results[i]
            seed = Value(self.builder.unique(f"d_{graph.result_names[i]}"), result.type.whole)
            self.backward.args.append(seed)
            given[result] = seed
        gradients = dict(given)
        self._reverse(graph.ops[:-1], gradients)
        arguments = sorted(self.derivation.arguments[graph.name])
        wanted = [i for i in arguments if graph.args[i].type.dtype in FLOATS]
        outputs = [self._or_zeros(gradients.get(graph.args[i]), graph.args[i]) for i in wanted]
        # A gradient that is passed through has to be a value of its own for whoever reads it twice.
        ends = graph.ops[-1].spans
        self.backward.ops.append(Op("return", outputs, spans=ends))
        self.backward.result_names = tuple(graph.args[i].name for i in wanted)
        _drop_dead(self.backward)
        self._read_saved()
        self.backward.drop_unused_weights()
        return Derivative(self.backward.name, results=tuple(seeds), arguments=tuple(wanted))

    def _reverse(self, ops: Sequence[Op], gradients: Gradients) -> None:
        """Runs backwards through operators; `gradients` of values grow on the way."""
        for op in reversed(ops):
            self.spans = op.spans
            d = [gradients.get(v) for v in op.results]
            if op.callee:
                self._call(op, d, gradients)
            elif op.kind in REPEATS:
                self._repeat(op, d, gradients)
            elif OPS[op.kind].differentiable and any(x is not None for x in d):
                self._one(op, d, gradients)

    def _one(self, op: Op, d: Sequence[Value | None], gradients: Gradients) -> None:
        if not (any(map(self.needs_grad, op.operands)) or self.trainable(op.symbols)):
            return
        saving = OPS[op.kind].saving
        if saving:
            op = _replace(op, saving, self.forward, self.derivation.program)
            d = [*d, *(None for _ in op.results[len(d) :])]
        try:
            found = OPS[op.kind].grad(self, op, d)
        except NotImplementedError:
            raise NotDifferentiable(f"{op.kind} has no derivative", op) from None
        for value, gradient in zip(op.operands, found, strict=True):
            if gradient is not None and self.needs_grad(value):
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
        derivative = self.derivation.program.derivatives[op.callee]
        forward = self.derivation.program.graphs[op.callee]
        operands = []
        for i in derivative.results:
            # Several results may be one value of the callee: their gradients add up.
            same = [j for j, v in enumerate(forward.results) if v is forward.results[i]]
            parts = [x for x in (d[j] for j in same) if x is not None]
            total = parts[0] if parts else self._or_zeros(None, _like(op.results[i], d))
            for part in parts[1:]:
                (total,) = self.add("add", [total, part], names=[f"d_{op.results[i].name}"])
            operands.append(total)
        scope = op.attrs["scope"]
        names = [f"d_{op.operands[i].name}" for i in derivative.arguments]
        found = self.add("call", operands, names=names, callee=derivative.backward, scope=scope)
        for i, gradient in zip(derivative.arguments, found, strict=True):
            if self.needs_grad(op.operands[i]):
                self._accumulate(gradients, op.operands[i], gradient)

    def _repeat(self, op: Op, d: Sequence[Value | None], gradients: Gradients) -> None:
        """Layers from the last to the first, the gradients of what is carried carried back."""
        if op.kind == "repeat_backward":
            raise NotDifferentiable("a gradient is not differentiated again", op)
        (region,) = op.regions
        carried = [i for i, v in enumerate(op.operands) if v in self.requires_grad]
        count = len(op.operands)
        stacked = [i for i in range(count, len(op.results)) if d[i] is not None]
        inside: Gradients = {}
        region_args = []
        for i in [*carried, *stacked]:
            yielded = region.yielded[i]
            arg = self.builder.value(f"d_{yielded.name}", yielded.type.whole)
            region_args.append(arg)
            if yielded in inside:
                raise NotDifferentiable(f"{yielded} is carried twice", op)
            inside[yielded] = arg
        made = set(region.args) | {v for inner in region.ops for v in inner.results}
        ops: list[Op] = []
        with self.builder.into(ops):
            self._reverse(region.ops[:-1], inside)
            ends = [self._or_zeros(inside.get(region.args[i]), region.args[i]) for i in carried]
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
            raise NotDifferentiable("equations between the layers have no derivative in a loop", op)
        outside = [v for v in inside if v not in made and v in self.requires_grad]
        if outside:
            raise NotDifferentiable(f"layers read {outside[0]} from outside of their loop", op)

    def _read_saved(self) -> None:
        """The first operator: what the backward graph reads of the forward graph."""
        own = {*self.backward.args, *(v for op in self.backward.walk() for v in op.results)}
        own |= {v for op in self.backward.walk() for r in op.regions for v in r.args}
        read = self.backward.read()
        needed = [v for v in in_order(self.forward) if v in read and v not in own]
        copies = {v: Value(v.name, v.type) for v in needed}
        for old, new in copies.items():
            self.backward.replace_uses(old, new)
        spans = (self.forward.span,) if self.forward.span else self.forward.ops[-1].spans
        self.backward.ops.insert(0, Op("saved", results=list(copies.values()), spans=spans))


def in_order(graph: Graph) -> list[Value]:
    """Arguments and results of operators outside of regions, as they come into being."""
    return [*graph.args, *(v for op in graph.ops for v in op.results)]


def _like(value: Value, gradients: Sequence[Value | None]) -> Value:
    """Something of the type of a value: a gradient, so that the value need not be kept for it."""
    return next((d for d in gradients if d is not None and d.type == value.type), value)


def _replace(op: Op, saving: Sequence[str], graph: Graph, program: Program) -> Op:
    """The operator that computes what the derivative needs besides, in place of `op`."""
    builder = Builder(graph, program.graphs)
    builder.ops = []
    kind, *names = saving
    names = [op.results[0].name, *names]
    builder.add(kind, op.operands, op.symbols, names=names, regions=(), spans=op.spans, **op.attrs)
    (made,) = builder.ops
    made.results[: len(op.results)] = op.results
    ops = list_of(graph, op)
    ops[ops.index(op)] = made
    return made


def save(graph: Graph, values: Sequence[Value]) -> None:
    """Lets the last operator of a graph but one save `values`, and nothing else."""
    graph.ops = [op for op in graph.ops if op.kind != "save"]
    if values:
        spans = graph.ops[-1].spans or ((graph.span,) if graph.span else ())
        graph.ops.insert(len(graph.ops) - 1, Op("save", list(values), spans=spans))


def _loss_outputs(program: Program) -> list[int]:
    """The results of the outermost block that have a gradient, by number.

    The loss, and in a stage of a pipeline the states that the next stage reads.
    """
    names = enumerate(program.main.result_names)
    return [i for i, name in names if name == "total" or name in program.boundary.sent]


def _seeds(graph: Graph, requires_grad: set[Value]) -> list[int]:
    """The results that have a gradient, by number; of equal ones the first."""
    seen: set[Value] = set()
    found = []
    for i, value in enumerate(graph.results):
        if value in requires_grad and value not in seen:
            found.append(i)
            seen.add(value)
    return found


def _requires_grad(graph: Graph, arguments: Iterable[int], callees: RequiresGrad) -> set[Value]:
    """Values that depend on a weight or on one of `arguments`; `callees` says so of results."""
    found = {graph.args[i] for i in arguments}

    def results(op: Op) -> list[Value]:
        if op.callee:
            return [v for i, v in enumerate(op.results) if i in callees[op.callee]]
        if op.kind == "repeat":
            carried = len(op.operands)
            stacked = zip(op.results[carried:], op.regions[0].yielded[carried:], strict=True)
            return [*op.results[:carried], *(v for v, inner in stacked if inner in found)]
        reads = any(v in found for v in op.operands)
        trainable = any(graph.weights[s].trainable for s in op.symbols)
        return op.results if (reads or trainable) and OPS[op.kind].differentiable else []

    def visit(ops: Sequence[Op]) -> None:
        for op in ops:
            if op.kind == "repeat":
                region = op.regions[0]
                found.update(v for v in region.args if v.type.dtype in FLOATS)
                visit(region.ops)
            found.update(v for v in results(op) if v.type.dtype in FLOATS)

    visit(graph.ops)
    return found


def _results_requiring_grad(program: Program) -> RequiresGrad:
    """For each graph the results that depend on its weights or real arguments."""
    found: RequiresGrad = {}
    for name, graph in program.graphs.items():  # callees stand before callers
        real = [i for i, v in enumerate(graph.args) if v.type.dtype in FLOATS]
        values = _requires_grad(graph, real, found)
        found[name] = {i for i, v in enumerate(graph.results) if v in values}
    return found


def _arguments_requiring_grad(program: Program, results: RequiresGrad) -> RequiresGrad:
    """For each graph the arguments that depend on a weight in some call of it."""
    found: RequiresGrad = {name: set() for name in program.graphs}
    received = program.boundary.received
    found[program.root] = {i for i, v in enumerate(program.main.args) if v.name in received}
    for name, graph in reversed(program.graphs.items()):  # callers come after their callees
        values = _requires_grad(graph, found[name], results)
        for op in graph.walk():
            if op.callee:
                found[op.callee] |= {i for i, v in enumerate(op.operands) if v in values}
    return found


def _drop_dead(graph: Graph) -> None:
    """Derivatives that are not needed, of operators that give several at once."""
    uses = graph.uses()
    for op in reversed(list(graph.ops)):
        if OPS[op.kind].pure and not op.regions and not any(uses.get(v) for v in op.results):
            graph.ops.remove(op)
            uses = graph.uses()
