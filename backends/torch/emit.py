"""Writing statements: lines, names, and the equation in the margin of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backends.torch.declare import TORCH_DTYPES, stored_name
from backends.torch.layout import WIDTH, lay_out, parse_call
from backends.torch.names import Names
from compiler.graph.core import Attr, Graph, Op
from compiler.graph.types import Type

MARGIN = 62  # column of the remarks, where there is room


@dataclass(frozen=True)
class Part:
    """What autograd is told of a part of the outermost block: its weights and `Gradients`."""

    weights: tuple[str, ...]
    gradients: str


class Emitter:
    """Statements of one graph, each by the function of its operator in `statements`.

    `methods` says by which method each called graph is to be reached, `trailing` what those of a
    program pass on: the cache, what is kept; `joined` is what `joined_names` gives. Given `units`,
    calls are made in the way of autograd (`runtime/unit.py`): each graph with its weights and its
    derivative's `Gradients`.
    """

    def __init__(
        self,
        graph: Graph,
        statements: Mapping[str, Emit],
        methods: Mapping[str, str],
        trailing: Mapping[str, Sequence[str]],
        joined: Mapping[str, str],
        units: Mapping[str, Part] | None = None,
    ) -> None:
        self.graph = graph
        self.statements = statements
        self.methods = methods
        self.trailing = trailing
        self.joined = joined
        self.units = units
        self.names = Names(graph)
        self.parts: dict[str, str] = {}  # weight of all experts: the name of its parts
        self.lines: list[str] = []
        self.indent = 0
        self._comment = ""

    def body(self) -> list[str]:
        """Lines of the method without its `return`."""
        for op in self.graph.ops[:-1]:
            self.statement(op)
        return self.lines

    def results(self) -> list[str]:
        return [self.names[v] for v in self.graph.results]

    # ---- lines ----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Adds a line; the comment of the block's line stands beside it where there is room."""
        text = "    " * self.indent + text
        comment, self._comment = self._comment, ""
        lines = wrap(text)
        if comment and len(lines) == 1 and len(text) + len(comment) + 4 <= WIDTH:
            lines = [f"{text:<{MARGIN}}  # {comment}"]
            if len(lines[0]) > WIDTH:
                lines = [f"{text}  # {comment}"]
        elif comment:
            lines.insert(0, f"{'    ' * self.indent}# {comment}")
        self.lines += lines

    def assign(self, op: Op, expression: str) -> None:
        if not op.results:
            self.line(expression)
            return
        targets = ", ".join([self.names.give(v, op) for v in op.results])
        self.line(f"{targets} = {expression}")

    def statement(self, op: Op) -> None:
        self.remark(op)
        self.statements[op.kind](self, op)

    def remark(self, op: Op) -> None:
        """Puts the place of `op` in the block beside the next line, where it stands for one."""
        self._comment = "" if op.kind in ("save", "saved", "accumulate_grad") else margin(op)

    # ---- pieces of expressions ---------------------------------------------------------------

    def operand(self, op: Op, index: int) -> str:
        return self.names[op.operands[index]]

    def operands(self, op: Op) -> str:
        return ", ".join(self.names[v] for v in op.operands)

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
        return f"self.{stored_name(op.symbols[0], self.joined).replace('.*.', '.')}"

    def weight(self, symbol: str) -> str:
        """The stored tensor, or the part of it that belongs to the expert at hand."""
        name = stored_name(symbol, self.joined)
        if name in self.parts:
            return f"{self.parts[name]}[expert]"
        return f"self.{name}"


def margin(op: Op) -> str:
    """What stands beside a statement: the remark of the block's line, and the line itself."""
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


def literal(value: Attr) -> str:
    """A number, flag or word as Python text."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


Emit = Callable[[Emitter, Op], None]


def call_f(name: str, *attrs: str, module: str = "F") -> Emit:
    """`F.name(operands, weights, attr=..)`."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [e.names[v] for v in op.operands] + [e.weight(s) for s in op.symbols]
        parts += [f"{a}={literal(op.attrs[a])}" for a in attrs]
        e.assign(op, f"{module}.{name}({', '.join(parts)})")

    return emit


def index_of(type: Type, dim: Attr) -> int:
    return [d.name for d in type.dims].index(str(dim))


def call_fp8(name: str, *attrs: str) -> Emit:
    """`fp8.name(operands, attr=..)`; products say in which element type they give their result."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [e.names[v] for v in op.operands]
        parts += [f"{a}={literal(op.attrs[a])}" for a in attrs]
        if op.attrs.get("parts"):
            parts.append(f"parts={op.attrs['parts']}")
        if "dtype" in op.attrs:
            parts.append(f"dtype={e.dtype(op.attrs['dtype'])}")
        e.assign(op, f"fp8.{name}({', '.join(parts)})")

    return emit
