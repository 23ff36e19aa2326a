"""Any graph as Python: its statements, names of values, and the line of the block as a remark."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backends.torch.declare import TORCH_DTYPES, attribute, stored_name
from backends.torch.layout import WIDTH, lay_out, parse_call
from backends.torch.names import Names
from backends.torch.sizes import Sizes
from compiler.graph.core import Attr, Graph, Op
from compiler.graph.types import Dim, Type
from compiler.ops import OPS

MARGIN = 62  # column of the remarks, where the line is short enough


@dataclass(frozen=True)
class Callee:
    """How a called graph is reached: by a method, or, without a name, by calling the module.

    `trailing` are the arguments of the method after its tensors: the cache, saved activations. Of
    its results, the graph has those in `results`; none: all of them, and no others.
    """

    method: str = ""
    trailing: tuple[str, ...] = ()
    results: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Subgraph:
    """What autograd needs of a part of the outermost block: its weights and `Gradients`."""

    weights: tuple[str, ...]
    gradients: str


@dataclass(frozen=True)
class Context:
    """What an emitter must know beyond its graph.

    `callees` are the graphs that it calls, `joined` is what `joined_names` gives, `sizes` names
    numbers, `bound` has the operators whose attributes are bound once for the whole module. Given
    `segments`, calls are made in the way of autograd (`runtime/unit.py`). `first_layer` stands for
    the number of the first layer where one text serves several stages.
    """

    statements: Mapping[str, Emit]
    callees: Mapping[str, Callee]
    joined: Mapping[str, str]
    sizes: Sizes
    bound: Mapping[str, str] = field(default_factory=dict)
    segments: Mapping[str, Subgraph] | None = None
    first_layer: str = ""


class Emitter:
    """Statements of one graph, each by the function of its operator in `context.statements`.

    `saves` says that the method takes `saved` and saves activations there, `saved` what those that
    it reads are called where they were saved.
    """

    def __init__(
        self, graph: Graph, context: Context, *, saves: bool = False, saved: Sequence[str] = ()
    ) -> None:
        self.graph = graph
        self.context = context
        self.saves = saves
        self.saved = saved
        self.names = Names(graph)
        self.parts: dict[str, str] = {}  # weight of all experts: the name of its parts
        self.products = _weight_products(graph)
        self.lines: list[str] = []
        self.indent = 0
        self._remark = self._last_remark = ""

    def body(self) -> list[str]:
        """Lines of the method without its `return`."""
        for op in self.graph.ops[:-1]:
            self.statement(op)
        return self.lines

    def results(self) -> list[str]:
        return [self.names[v] for v in self.graph.results]

    # ---- lines ----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Adds a line; the remark is on the same line, or above it where that would be too long."""
        text = "    " * self.indent + text
        remark, self._remark = self._remark, ""
        lines = wrap(text)
        if remark and len(lines) == 1 and len(text) + len(remark) + 4 <= WIDTH:
            lines = [f"{text:<{MARGIN}}  # {remark}"]
            if len(lines[0]) > WIDTH:
                lines = [f"{text}  # {remark}"]
        elif remark:
            lines.insert(0, f"{'    ' * self.indent}# {remark}")
        self.lines += lines

    def assign(self, op: Op, expression: str) -> None:
        if not op.results:
            self.line(expression)
            return
        if op in self.products:
            function, _, operands = expression.partition("(")
            self.line(f"grads.defer({self.stored(self.products[op])}, {function}, {operands}")
            return
        targets = ", ".join([self.names.give(v, op) for v in op.results])
        self.line(f"{targets} = {expression}")

    def statement(self, op: Op) -> None:
        self.remark(op)
        bound = self.context.bound.get(constants(op))
        if bound:
            self.assign(op, f"{bound}({self.operands(op)})")
        else:
            self.context.statements[op.kind](self, op)

    def remark(self, op: Op) -> None:
        """Adds the place of `op` in the block to the next line; once for its statements."""
        if op.kind in ("save", "saved", "accumulate_grad", "parameter"):
            return
        remark = margin(op)
        self._remark = remark if remark != self._last_remark else ""
        self._last_remark = remark

    # ---- parts of expressions ----------------------------------------------------------------

    def operand(self, op: Op, index: int) -> str:
        return self.names[op.operands[index]]

    def operands(self, op: Op) -> str:
        return ", ".join(self.names[v] for v in op.operands)

    def size(self, dim: Dim) -> str:
        """The size of a dimension, by name where it has one."""
        return self.context.sizes.of(dim)

    def named(self, op: Op, *attrs: str) -> list[str]:
        """`attr=value` for each of the attributes; values by name where the spec has one."""
        return [f"{a}={self.context.sizes.number(a, op.attrs[a])}" for a in attrs]

    def dtype(self, name: Attr) -> str:
        """An element type as torch calls it; the model's own is that of the model at hand."""
        return TORCH_DTYPES.get(str(name)) or self._model_dtype()

    def _model_dtype(self) -> str:
        """The element type of the model at hand, which may be another one than the spec's."""
        like = [self.names[v] for v in self.graph.args if v.type.dtype == "bf16"]
        like += [
            self.weight(name)
            for name, weight in self.graph.weights.items()
            if weight.type.dtype == "bf16" and "*" not in name
        ]
        return f"{like[0]}.dtype" if like else "torch.bfloat16"

    def stored(self, op: Op) -> str:
        """The stored tensor of an operator's weights; of all experts where it is for all."""
        name = stored_name(op.symbols[0], self.context.joined).replace(".*.", ".")
        return f"self.{attribute(name)}"

    def weight(self, symbol: str) -> str:
        """The stored tensor, or the part of it that belongs to the expert at hand."""
        name = stored_name(symbol, self.context.joined)
        if name in self.parts:
            return f"{self.parts[name]}[expert]"
        return f"self.{attribute(name)}"


class TrainingEmitter(Emitter):
    """A method that serves scores and training: it saves only if `saved` is given.

    `scored` are the results, by number, that scores need. The others are None without `saved`.
    """

    def __init__(self, graph: Graph, context: Context, scored: Sequence[int]) -> None:
        self.scored = scored
        needed = set(_needed(graph, [graph.results[i] for i in scored]))
        self.always = [op for op in graph.ops[:-1] if op in needed]
        self.training = [op for op in graph.ops[:-1] if op not in needed]
        # Names are given in the order in which the statements will stand.
        ordered = Graph(graph.name, graph.args, [*self.always, *self.training, graph.ops[-1]])
        ordered.weights = graph.weights
        super().__init__(ordered, context, saves=True)

    def body(self) -> list[str]:
        for op in self.always:
            self.statement(op)
        everything = len(self.scored) == len(self.graph.results)
        if self.training and everything:
            self.line("if saved is not None:")
            self.indent += 1
        elif self.training:
            values = (
                self.names[v] if i in self.scored else "None"
                for i, v in enumerate(self.graph.results)
            )
            self.line("if saved is None:")
            self.line(f"    return {', '.join(values)}")
        for op in self.training:
            self.statement(op)
        self.indent = 0
        return self.lines


def _weight_products(graph: Graph) -> dict[Op, Op]:
    """Products that are gradients of weights and nothing else, which may be computed later, each
    with the operator that adds it to the gradient."""
    readers = Counter(v for op in graph.walk() for v in op.operands)
    adding = {
        op.operands[0]: op
        for op in graph.walk()
        if op.kind == "accumulate_grad" and readers[op.operands[0]] == 1
    }
    products = (op for op in graph.walk() if OPS[op.kind].weight_product)
    return {op: adding[op.result] for op in products if op.result in adding}


def _needed(graph: Graph, results: Sequence[object]) -> Iterator[Op]:
    """The operators of a graph that some of its results follow from."""
    wanted = set(map(id, results))
    for op in reversed(graph.ops[:-1]):
        if any(id(v) in wanted for v in op.results):
            wanted |= {id(v) for inner in _walk(op) for v in inner.operands}
            yield op


def _walk(op: Op) -> Iterator[Op]:
    yield op
    for region in op.regions:
        for inner in region.ops:
            yield from _walk(inner)


def constants(op: Op) -> str:
    """Identifies an operator with its attributes."""
    return f"{op.kind} {sorted(op.attrs.items())!r}"


def margin(op: Op) -> str:
    """The remark of a statement: that of the block's line, and the line itself."""
    if not op.spans:
        return ""
    span = op.spans[0]
    last_line = span.source.position(max(span.start, span.end - 1))[0]
    _, _, remark = span.source.line(last_line).partition("#")
    place = f"{span.source.name.rsplit('/', 1)[-1]}:{span.line}"
    text = f"{place}  {remark.strip()}" if remark.strip() else place
    return re.sub(r"[^\x20-\x7e]", "?", text)


def wrap(text: str) -> list[str]:
    """A line that is too long, broken at the arguments of its call; then at its targets, too."""
    if len(text) <= WIDTH:
        return [text]
    body = text.lstrip()
    target, equals, expression = body.rpartition(" = ")
    indent, call = len(text) - len(body), parse_call(expression)
    lines = lay_out(f"{target}{equals}", call, indent)
    targets = target.split(", ")
    if len(lines[0]) <= WIDTH or len(targets) == 1:
        return lines
    space = " " * indent
    broken = [f"{space}    {name}," for name in targets]
    return [f"{space}(", *broken, *lay_out(") = ", call, indent)]


Emit = Callable[[Emitter, Op], None]


def call_f(name: str, *attrs: str, module: str = "F") -> Emit:
    """`F.name(operands, weights, attr=..)`."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [e.names[v] for v in op.operands] + [e.weight(s) for s in op.symbols]
        e.assign(op, f"{module}.{name}({', '.join([*parts, *e.named(op, *attrs)])})")

    return emit


def index_of(type: Type, dim: Attr) -> int:
    return [d.name for d in type.dims].index(str(dim))


def call_fp8(name: str, *attrs: str) -> Emit:
    """`fp8.name(operands, attr=..)`; products say in which element type they give their result."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [*filter(None, (e.names[v] for v in op.operands)), *e.named(op, *attrs)]
        if op.attrs.get("parts"):
            parts.append(f"parts={op.attrs['parts']}")
        if "dtype" in op.attrs:
            parts.append(f"dtype={e.dtype(op.attrs['dtype'])}")
        e.assign(op, f"fp8.{name}({', '.join(parts)})")

    return emit
