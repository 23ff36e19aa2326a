"""The graph: values, operators, regions, weights. Static single assignment, in program order.

A `Program` is a set of graphs, one for each distinct block, that call one another; layers and
experts are regions, so that its size grows with the number of distinct blocks only. The invariants
are in `README.md` in this folder; `verify.py` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from compiler.graph.types import Dim, Type
from dsl.source import Span

# Operators that run their region once for each layer of a range.
REPEATS = ("repeat", "repeat_backward")

Attr = int | float | bool | str | tuple["Attr", ...]


@dataclass(eq=False, slots=True)
class Value:
    """A tensor: an argument, or a result of exactly one operator. `name` is unique in its graph."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(eq=False, slots=True)
class Region:
    """Operators inside an operator. The last one is `yield`; outer values are visible."""

    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def yielded(self) -> list[Value]:
        return self.ops[-1].operands


class Attributes:
    """Attributes read as the types that their operator declares, to which `verify` holds them."""

    __slots__ = ()
    attrs: Mapping[str, Attr]

    def number(self, name: str) -> int:
        return cast(int, self.attrs[name])

    def real(self, name: str) -> float:
        return cast(float, self.attrs[name])

    def text(self, name: str) -> str:
        return cast(str, self.attrs[name])

    def items(self, name: str) -> tuple[Attr, ...]:
        return cast(tuple[Attr, ...], self.attrs[name])

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(map(str, self.items(name)))

    @property
    def parts(self) -> tuple[int, ...]:
        """The sizes of what is tiled apart; none where an operator has one part only."""
        parts = self.items("parts") if "parts" in self.attrs else ()
        return tuple(part for part in parts if isinstance(part, int))

    @property
    def layers(self) -> range:
        """The layers of a repeat."""
        return range(self.number("start"), self.number("start") + self.number("count"))


@dataclass(eq=False, slots=True)
class Op(Attributes):
    """One operator. `symbols` name weights of the graph; `spans` say where it came from."""

    kind: str
    operands: list[Value] = field(default_factory=list)
    symbols: tuple[str, ...] = ()
    attrs: dict[str, Attr] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)
    spans: tuple[Span, ...] = ()

    @property
    def result(self) -> Value:
        (only,) = self.results
        return only

    @property
    def callee(self) -> str:
        """The graph that a `call` calls; empty for every other operator."""
        return self.text("callee") if self.kind == "call" else ""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model, named as in the published checkpoint, relative to its block.

    A `*` in the name is the index of the expert; `stack` is then their number and `type` that of
    one. It starts as N(value, std^2), or as ones or zeros.
    With `axis` each rank of that axis of the mesh holds `stack` experts of its own, in order.
    `decay` says that weight decay applies to it if it is a matrix: not to a free parameter, unless
    its block says so.
    `fp8` says that its products are in FP8, and how scales are kept: `recipe`, `fp32` or `ue8m0`.
    """

    type: Type
    init: str = "normal"
    std: float = 0.0
    trainable: bool = True
    stack: int = 1
    axis: str = ""
    fp8: str = ""
    value: float = 0.0
    decay: bool = True

    @property
    def fp8_scale(self) -> str:
        """How the scales of its FP8 copy are kept: `fp32`, `ue8m0`, or empty without a copy."""
        return "fp32" if self.fp8 == "recipe" else self.fp8


@dataclass(frozen=True, slots=True)
class CacheType:
    """What a decoder remembers: entries of `type` along `context`, for one block."""

    type: Type


@dataclass(eq=False)
class Graph:
    """One block: arguments, weights, operators, results (the operands of the last op, `return`)."""

    name: str
    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    caches: dict[str, CacheType] = field(default_factory=dict)
    # Those beyond what the block declares were collected from blocks inside.
    result_names: tuple[str, ...] = ()
    about: str = ""
    span: Span | None = None

    @property
    def results(self) -> list[Value]:
        return self.ops[-1].operands

    @property
    def saved(self) -> list[Value]:
        """What the graph saves for the graph of its gradients: the operands of its `save`."""
        return next((op.operands for op in self.ops if op.kind == "save"), [])

    def walk(self) -> Iterator[Op]:
        """Every operator, those of regions after the operator that holds them."""
        return walk(self.ops)

    def calls(self) -> Iterator[str]:
        """Names of the graphs that this one calls, in order, each once."""
        return iter(dict.fromkeys([op.text("callee") for op in self.walk() if op.kind == "call"]))

    def replace_uses(self, old: Value, new: Value) -> None:
        """Let every operator that reads `old` read `new`."""
        for op in self.walk():
            op.operands = [new if v is old else v for v in op.operands]

    def producers(self) -> dict[Value, Op]:
        """The operator that makes each value; arguments have none."""
        return {value: op for op in self.walk() for value in op.results}

    def uses(self) -> dict[Value, list[Op]]:
        """The operators that read each value in order, once for each operand; none: no entry."""
        found: dict[Value, list[Op]] = {}
        for op in self.walk():
            for value in op.operands:
                found.setdefault(value, []).append(op)
        return found

    def read(self) -> set[Value]:
        """The values that some operator reads."""
        return {value for op in self.walk() for value in op.operands}

    def drop_unused_weights(self) -> None:
        """Leaves out the weights that no operator names."""
        used = {symbol for op in self.walk() for symbol in op.symbols}
        self.weights = {name: weight for name, weight in self.weights.items() if name in used}


@dataclass(frozen=True, slots=True)
class Derivative:
    """The graphs of the gradients of a forward graph, and what corresponds in their interfaces.

    `backward` takes the gradients of the forward graph's `results`, then the values of its
    arguments `lifted`, and gives the gradients of its `arguments`, all by number. It computes those
    of the weights, too, unless a graph `weights` does, later: one without arguments and results.

    Each begins with `saved`, whose results are the operands of the `save` of the graph before it:
    `backward` reads what the forward graph saves, `weights` what `backward` saves.
    """

    backward: str
    weights: str = ""
    results: tuple[int, ...] = ()
    lifted: tuple[int, ...] = ()
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """The graphs that end a training step for the weights of a forward graph.

    `reduce` sums gradients over ranks, saves what it has of the sums, and gives the sum of their
    squares. `update` reads that, takes the factor that clips gradients, and assigns new weights.
    """

    reduce: str
    update: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses the boundaries of a pipeline stage, by the names that its root gives them.

    `received` are arguments, the results `sent` of the previous stage in the same order. Gradients
    go the other way: those of `sent` come from the next stage, those of `received` go back.
    """

    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.received or self.sent)


@dataclass(eq=False)
class Program:
    """Graphs by name; `root` is the one that a user calls. `aliases` are copies in checkpoints.

    `derivatives` says by forward graph which graphs give its gradients; `boundary`, of a pipeline
    stage, what it exchanges with its neighbours. `steps`, of a program that ends a training step,
    says by forward graph which graphs update its weights. `counts` are arguments of the root that
    say how many labels of another argument count in the whole step, on all ranks together.
    """

    name: str
    root: str
    graphs: dict[str, Graph] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    derivatives: dict[str, Derivative] = field(default_factory=dict)
    boundary: Boundary = Boundary()
    counts: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def main(self) -> Graph:
        return self.graphs[self.root]

    @property
    def backward(self) -> str:
        """The graph of the gradients of the root, where a program has one."""
        return self.derivatives[self.root].backward if self.root in self.derivatives else ""

    @property
    def weights(self) -> str:
        """The graph of the gradients of weights, where it is separate from `backward`."""
        return self.derivatives[self.root].weights if self.root in self.derivatives else ""

    @property
    def roots(self) -> tuple[str, ...]:
        """The graphs that no graph of the program calls."""
        names = (self.root, self.backward, self.weights, self.update)
        return tuple(name for name in names if name)

    @property
    def update(self) -> str:
        """The graph that updates weights after the root, of a program that ends a step."""
        found = (step.update for step in self.steps.values() if step.reduce == self.root)
        return next(found, "")

    @property
    def backward_boundary(self) -> Boundary:
        """What `backward` receives from the next stage and sends to the previous one."""
        if not self.backward:
            return Boundary()
        derivative, backward = self.derivatives[self.root], self.graphs[self.backward]
        seeds = zip(derivative.results, backward.args, strict=False)
        given = zip(derivative.arguments, backward.result_names, strict=True)
        return Boundary(
            tuple(v.name for i, v in seeds if self.main.result_names[i] in self.boundary.sent),
            tuple(name for i, name in given if self.main.args[i].name in self.boundary.received),
        )

    def calls_of(self, name: str) -> Iterator[tuple[Graph, Op]]:
        """Every call of a graph, and the graph that it is in."""
        for graph in self.graphs.values():
            for op in graph.walk():
                if op.kind == "call" and op.callee == name:
                    yield graph, op

    def backward_of(self, name: str) -> Graph | None:
        """The graph of the gradients of a graph, where it has been derived."""
        derivative = self.derivatives.get(name)
        return self.graphs[derivative.backward] if derivative else None

    def forward_of(self, name: str) -> str:
        """The forward graph that a graph gives gradients of; of any other graph itself."""
        found = (f for f, d in self.derivatives.items() if name in (d.backward, d.weights))
        return next(found, name)

    def saver_of(self, name: str) -> Graph | None:
        """The graph that saves what another one reads; None for a graph that reads nothing."""
        for forward, derivative in self.derivatives.items():
            if name == derivative.backward:
                return self.graphs[forward]
            if name == derivative.weights:
                return self.graphs[derivative.backward]
        found = (self.graphs[s.reduce] for s in self.steps.values() if name == s.update)
        return next(found, None)


def walk(ops: Sequence[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from walk(region.ops)


def op_lists(graph: Graph) -> Iterator[list[Op]]:
    """Every list of operators of a graph, innermost first, so that one may shrink them."""

    def inside(ops: list[Op]) -> Iterator[list[Op]]:
        for op in ops:
            for region in op.regions:
                yield from inside(region.ops)
        yield ops

    return inside(graph.ops)


def list_of(graph: Graph, op: Op) -> list[Op]:
    """The list of operators that holds an operator of a graph."""
    return next(ops for ops in op_lists(graph) if op in ops)


def bind_dims(formal: Sequence[Type], actual: Sequence[Type]) -> dict[str, Dim]:
    """Which run-time dimension of the caller each one of the callee is bound to.

    Raises ValueError with the two dimensions that do not meet.
    """
    bound: dict[str, Dim] = {}
    for f, a in zip(formal, actual, strict=True):
        if (len(f.dims), f.dtype, f.partial) != (len(a.dims), a.dtype, a.partial):
            raise ValueError(f"expects {f}, got {a}")
        for fd, ad in zip(f.dims, a.dims, strict=True):
            if fd.size is None and ad.size is None and ad.offset >= fd.offset:
                if fd.axes != ad.axes:
                    raise ValueError(f"expects {fd}, got {ad}")
                whole = ad._replace(offset=ad.offset - fd.offset)
                if bound.setdefault(fd.name, whole) == whole:
                    continue
                first = bound[fd.name]
                raise ValueError(f"{fd.name} is {first} in one argument and {whole} in another")
            if fd != ad:
                raise ValueError(f"expects {fd.words}, got {ad.words}")
    return bound


def sizes_inside(callee: Graph, call: Op, sizes: Mapping[str, int]) -> dict[str, int]:
    """The run-time sizes of a caller, and those that the callee's dimensions have in this call.

    Never below 0: depths beyond the length of a sequence predict nothing.
    """
    inner = dict(sizes)
    for formal, actual in zip(callee.args, call.operands, strict=True):
        for inside, outside in zip(formal.type.dims, actual.type.dims, strict=True):
            if inside.size is None:
                inner[inside.name] = max(0, outside.at(sizes))
    return inner


def substitute(type: Type, bound: Mapping[str, Dim]) -> Type:
    """A type of the callee in the caller's dimensions."""

    def dim(d: Dim) -> Dim:
        if d.size is not None or d.name not in bound:
            return d
        outer = bound[d.name]
        return Dim(outer.name, None, outer.offset + d.offset, outer.axes)

    return type.with_dims(*map(dim, type.dims))


def copy_program(program: Program) -> Program:
    """A program that shares nothing with the first one but types, attributes and spans."""
    graphs = {name: _copy_graph(graph) for name, graph in program.graphs.items()}
    return Program(
        program.name,
        program.root,
        graphs,
        dict(program.aliases),
        dict(program.derivatives),
        program.boundary,
        dict(program.counts),
        dict(program.steps),
    )


def _copy_graph(graph: Graph) -> Graph:
    values: dict[Value, Value] = {}

    def copies(old: Sequence[Value]) -> list[Value]:
        for value in old:
            if value not in values:
                values[value] = Value(value.name, value.type)
        return [values[value] for value in old]

    def ops(old: Sequence[Op]) -> list[Op]:
        return [
            Op(
                op.kind,
                copies(op.operands),
                op.symbols,
                dict(op.attrs),
                [Region(copies(r.args), ops(r.ops)) for r in op.regions],
                copies(op.results),
                op.spans,
            )
            for op in old
        ]

    return Graph(
        graph.name,
        copies(graph.args),
        ops(graph.ops),
        dict(graph.weights),
        dict(graph.caches),
        graph.result_names,
        graph.about,
        graph.span,
    )
