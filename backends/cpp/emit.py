"""A graph as a C++ structure: its weights, and a method of calls of `operators.h`."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from backends.cpp.words import comment, identifier
from backends.torch.declare import stored_name
from backends.torch.emit import margin
from compiler.graph.core import Attr, Graph, Op, Value
from compiler.graph.types import Dim, Type

ALIGNED = 16
"""The arena begins every value at a multiple of so many numbers."""


class Unsupported(Exception):
    """An operator, or a use of one, that C++ has no statement for."""


@dataclass(frozen=True)
class Member:
    """What a structure holds: `type name`, made by `made` of what a caller binds."""

    type: str
    name: str
    made: str


@dataclass(frozen=True)
class Bindings:
    """What a structure binds, in the order of its members; paths are relative to its module."""

    weights: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    """Weights that may be quantized."""
    caches: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """Module, entry, and the shape of what is remembered of a token."""
    angles: tuple[tuple[tuple[str, Attr], ...], ...] = ()
    """Arguments of `rope_table`, one for each table."""

    def within(self, path: str) -> Bindings:
        """The same, seen from a module that has this one at `path`."""
        return Bindings(
            tuple(f"{path}.{name}" for name in self.weights),
            tuple(f"{path}.{name}" for name in self.products),
            tuple((f"{path}.{m}" if m else path, e, shape) for m, e, shape in self.caches),
            self.angles,
        )

    def __add__(self, other: Bindings) -> Bindings:
        return Bindings(
            self.weights + other.weights,
            self.products + other.products,
            self.caches + other.caches,
            self.angles + other.angles,
        )


@dataclass(frozen=True)
class Memory:
    """Numbers of the arena: for each row, and besides."""

    row: int = 0
    once: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.row + other.row, self.once + other.once)

    def most(self, other: Memory) -> Memory:
        """Enough for either."""
        return Memory(max(self.row, other.row), max(self.once, other.once))


@dataclass(frozen=True)
class Structure:
    """A graph in C++. `memory` is what a call of its method takes of the arena at most."""

    name: str
    about: str
    members: Sequence[Member]
    parameters: Sequence[str]
    lines: Sequence[str]
    bindings: Bindings
    memory: Memory


@dataclass
class Emitter:
    """The method of one graph: a statement an operator, and a barrier only where a thread reads
    what others wrote since the last one.

    `callees` are the structures of called graphs, `joined` is what `joined_names` gives, `own` the
    element type of the model, `makes` the operators whose results are memory of their own.
    """

    graph: Graph
    statements: Mapping[str, Statement]
    callees: Mapping[str, Structure]
    joined: Mapping[str, str]
    own: str
    makes: Container[str] = ()
    lines: list[str] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    bindings: Bindings = Bindings()
    memory: Memory = Memory()
    inside: Memory = Memory()
    choices: int = 1  # slots of a row

    def __post_init__(self) -> None:
        self._base: dict[Value, Value] = {}
        self.apart: set[Value] = set()  # heads with something else between them
        self._written: dict[Value, str] = {}
        self._given: set[Value] = set()  # results, whose memory the caller has allocated
        self._names: dict[Value, str] = {}
        self._remark = ""

    # ---- the whole ---------------------------------------------------------------------------

    def root(self, name: str) -> Structure:
        """The outermost graph, whose arguments and one result lie where the caller says."""
        for value in self.graph.args:
            if value.type.dtype != "i64":  # the states that a draft starts from
                width = size(value.type.last)
                rows = f"{{const_cast<float *>(s.call.state), {width}, s.n, {width}}}"
                self.lines.append(f"const Rows {self.name(value)} = {rows};")
        (logits,) = self.graph.results
        if not any(logits in op.results for op in self.graph.ops if op.kind in self.makes):
            raise Unsupported("logits that are part of another value")
        width = size(logits.type.last)
        self.lines.append(
            f"const Rows {self.name(logits)} = {{s.call.logits, {width}, s.scored, {width}}};"
        )
        self._given.add(logits)
        return replace(self.structure(name), parameters=())

    def structure(self, name: str) -> Structure:
        """The structure `name`, with the graph's arguments and places for its results."""
        parameters = [f"{kind(v.type)} {self.name(v)}" for v in self.graph.args]
        made = {v for op in self.graph.ops[:-1] if op.kind in self.makes for v in op.results}
        late = []
        for i, value in enumerate(self.graph.results):
            to = self.name(value)
            if value not in made or parameters.count(f"{kind(value.type)} {to}"):
                to = f"result_{i}"
                late.append((value, to))
            self._given.add(value)
            parameters.append(f"{kind(value.type)} {to}")
        for op in self.graph.ops[:-1]:
            self.statement(op)
        for value, to in late:
            self.put(f"copy(s, {self.name(value)}, {to})", [value])
        self.wait()
        return Structure(
            identifier(name),
            self.graph.about,
            tuple(self.members.values()),
            parameters,
            self.lines,
            self.bindings,
            self.memory + self.inside,
        )

    def statement(self, op: Op) -> None:
        remark = margin(op)
        if remark and remark != self._remark:
            self.lines += comment(remark)
        self._remark = remark
        statement = self.statements.get(op.kind)
        if statement is None:
            raise Unsupported(f"{op.kind}{place(op)}")
        unknown = op.attrs.keys() - statement.attrs
        if unknown:  # its meaning would be lost
            raise Unsupported(f"{op.kind} with {', '.join(sorted(unknown))}{place(op)}")
        statement.emit(self, op)

    # ---- values ------------------------------------------------------------------------------

    def name(self, value: Value) -> str:
        return self._names.get(value) or identifier(value.name)

    def call(self, value: Value, name: str) -> None:
        """Lets a value of a region bear the name of a variable."""
        self._names[value] = name

    def count(self, type: Type) -> tuple[str, int]:
        """How many rows a value has: as an expression, and for each row of the step at most."""
        first = [d.name for d in type.dims[:-1]]
        if first[:2] == ["batch", "seq"]:
            return "s.n", 1
        if first[:1] == ["slot"]:
            return f"s.n * {self.choices}", self.choices
        if first[:1] == ["batch"]:
            return "s.scored", 1
        raise Unsupported(f"a value of type {type}")

    def make(self, value: Value) -> str:
        """Allocates a value, unless the caller has; its name."""
        name = self.name(value)
        if value in self._given:
            return name
        count, times = self.count(value.type)
        if kind(value.type) == "Heads":
            heads, width = (size(d) for d in value.type.dims[-2:])
            self.lines.append(f"const Heads {name} = arena.heads({count}, {heads}, {width});")
            self.takes(times * heads * width)
        else:
            of = "ints" if kind(value.type) == "Ints" else "rows"
            width = size(value.type.last)
            text = f"const {kind(value.type)} {name} = arena.{of}({count}, {width});"
            self.lines.append(text)
            self.takes(times * width)
        return name

    def takes(self, row: int, once: int = 0) -> None:
        """Counts memory of the arena that a statement takes: numbers of each row, and besides."""
        self.memory += Memory(row, once + ALIGNED)

    def view(self, value: Value, of: Value, expression: str) -> None:
        """A value that lies in another one's memory."""
        self._base[value] = self.base(of)
        self.lines.append(f"const {kind(value.type)} {self.name(value)} = {expression};")

    def base(self, value: Value) -> Value:
        return self._base.get(value, value)

    def rows(self, op: Op, i: int = 0) -> str:
        """An operand that must be rows, not heads."""
        value = op.operands[i]
        if kind(value.type) != "Rows":
            raise Unsupported(f"{op.kind} of {value.type}{place(op)}")
        return self.name(value)

    # ---- who writes what -----------------------------------------------------------------------

    def put(
        self, call: str, reads: Sequence[Value], writes: Sequence[Value] = (), by: str = "rows"
    ) -> None:
        """A call of an operator, after a barrier where it needs one.

        `by` says what each thread computes of it: `rows` or `slots`, each the same in all of these
        calls, or else something that only a barrier makes known to others.
        """
        for value in reads:
            written = self._written.get(self.base(value))
            if written is not None and not (written == by and by in ("rows", "slots")):
                self.wait()
                break
        self.lines.append(f"op::{call};")
        for value in writes:
            self._written[self.base(value)] = by

    def wait(self) -> None:
        if self._written:
            self.lines.append("s.wait();")
            self._written.clear()

    # ---- members -----------------------------------------------------------------------------

    def weight(self, op: Op, i: int = 0) -> str:
        """The stored tensor of an operator's weights, which is read as it is."""
        weight = self.graph.weights[op.symbols[i]]
        if weight.stack > 1:
            raise Unsupported(f"{op.kind} of experts in {weight.type.dtype}{place(op)}")
        sizes = [size(d) for d in weight.type.dims]
        of = ("vector", "matrix")[len(sizes) - 1]
        stored = stored_name(op.symbols[i], self.joined)
        return self._stored(stored, f"op::{of.capitalize()}", of, sizes, weight.type.dtype)

    def product(self, op: Op, rows: int = 0) -> str:
        """The stored tensor that an operator multiplies with: `rows` rows where several are stored
        as one; of all experts, `Matrices`. It may be quantized, unless something else reads it, or
        experts are chosen by it."""
        symbol = op.symbols[0]
        weight = self.graph.weights[symbol]
        if weight.type.dtype != self.own or self._is_exact(op):
            return self.weight(op)
        sizes = [size(d) for d in weight.type.dims]
        sizes[0] = rows or sizes[0]
        element = "Fp8Product" if weight.fp8 else "Product"
        stored = stored_name(symbol, self.joined).replace(".*.", ".")
        if weight.stack > 1:
            sizes.insert(0, weight.stack)
            return self._stored(stored, "op::Matrices", "products_of", sizes, element)
        return self._stored(stored, "op::Matrix", "product", sizes, element)

    def _is_exact(self, op: Op) -> bool:
        """Whether a product needs the weight itself: it is that of an embedding, or of a gate."""
        walked = list(self.graph.walk())
        embedded = any(o.kind == "embedding" and o.symbols == op.symbols for o in walked)
        return embedded or any(o.kind == "gate" and op.result in o.operands for o in walked)

    def _stored(self, stored: str, type: str, bind: str, sizes: Sequence[int], element: str) -> str:
        """The member for a stored tensor, made by a method of `Bound`."""
        if element not in ("Product", "Fp8Product"):
            element, bindings = self.element(element), Bindings(weights=(stored,))
        else:
            bindings = Bindings(products=(stored,))
        name = identifier(stored.removesuffix(".weight").replace(".", "_"))
        made = f"bound.{bind}<{element}>({', '.join(map(str, sizes))})"
        if name not in self.members:
            self._bind(Member(f"{type}<{element}>", name, made))
            self.bindings += bindings
        elif self.members[name].made != made:
            raise Unsupported(f"a part of the weight {stored}")
        return f"this->{name}"

    def element(self, dtype: str) -> str:
        """Weights in the model's own element type may be held in another."""
        if dtype == self.own:
            return "Weight"
        if dtype == "f32":
            return "float"
        raise Unsupported(f"a weight in {dtype}")

    def cache(self, member: Member, entry: str, shape: tuple[int, ...]) -> None:
        """What is remembered of each token, under the name of an entry."""
        self._bind(member)
        self.bindings += Bindings(caches=(("", entry, shape),))

    def module(self, member: Member, callee: Structure, paths: Sequence[str]) -> None:
        """Modules of called graphs, one for each path."""
        self._bind(member)
        for path in paths:
            self.bindings += callee.bindings.within(path)

    def angles(self, op: Op) -> None:
        """A table of angles, and what it has for the position of each row."""
        cos, sin = op.results
        name = f"angles_{len(self.bindings.angles)}"
        self._bind(Member("op::Table", name, f"bound.table({size(cos.type.last)})"))
        self.bindings += Bindings(angles=(tuple(op.attrs.items()),))
        made = [self.make(cos), self.make(sin)]
        self.put(f"rope_table(s, this->{name}, {', '.join(made)})", [], op.results)

    def made(self, value: Value) -> bool:
        """Whether a value has memory of its own, with nothing between its rows and heads."""
        return self.base(value) is value and value not in self.graph.args

    def joined_heads(self, value: Value) -> str:
        """A value as rows, in which the heads are contiguous, in order."""
        if kind(value.type) == "Rows":
            return self.name(value)
        if value in self.apart:
            raise Unsupported(f"heads of {value.type} that are part of another value")
        return f"op::flatten({self.name(value)})"

    def _bind(self, member: Member) -> None:
        if member.name in self.members:
            raise Unsupported(f"two members called {member.name}")
        self.members[member.name] = member


Emit = Callable[[Emitter, Op], None]


@dataclass(frozen=True)
class Statement:
    """How an operator is written, and which attributes of it that takes into account."""

    emit: Emit
    attrs: frozenset[str]


def kind(type: Type) -> str:
    """The class of `operators.h` for values of a type."""
    if type.dtype in ("i64", "i32"):
        return "Ints"
    return "Heads" if len(type.dims) == 4 else "Rows"


def size(dim: Dim) -> int:
    if dim.size is None:
        raise Unsupported(f"the run-time dimension {dim}")
    return dim.size


def numbers(type: Type) -> int:
    """Numbers of a token."""
    return prod(d.size for d in type.dims if d.size is not None)


def place(op: Op) -> str:
    if not op.spans:
        return ""
    span = op.spans[0]
    return f" ({span.source.name.rsplit('/', 1)[-1]}:{span.line})"
