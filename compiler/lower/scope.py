"""What equations of a block are lowered into: names known so far, weights, operators, errors."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Region, Value, Weight
from compiler.graph.types import Dim, Type
from compiler.lower.bind import BlockRef, Bound, Const, related_settings
from compiler.lower.names import word_problem
from compiler.lower.state import Lowering, Stop, is_size
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.evaluate import evaluate
from dsl.source import Span

_DIM_NAME = re.compile(r"[A-Za-z_0-9]+([*+][A-Za-z_0-9]+)*")


class Poison:
    """The result of what failed; what follows from it is not reported again."""


POISON = Poison()


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The index of a `repeat`: it may only stand in names, where it becomes `*`."""


Entry = Value | Const | BlockRef | LayerIndex | Poison
Result = list[Value] | Const | Poison


@dataclass
class Scope:
    """A block being lowered. Inlined blocks and regions share the builder of the one around."""

    low: Lowering
    bound: Bound
    builder: Builder
    prefix: tuple[str, ...] = ()
    env: dict[str, Entry] = field(default_factory=dict)
    collected: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[ast.Name, Value]] = field(default_factory=list)
    stack: int = 1
    inside: str = ""  # `repeat` in the lines of one, `region` in a block written out in a region
    here: Span | None = None
    returned: list[Value] | None = None
    returns: ast.Return | None = None

    @abstractmethod
    def experts(
        self, tensors: list[Value], count: Dim, ref: BlockRef, path: str, **attrs: Any
    ) -> list[Value]:
        """The `experts` operator: one expert's equations as its region, weights under `path.*`."""

    @property
    def is_root(self) -> bool:
        """Whether this is the outermost block, or equations written out in it."""
        return self.builder.graph.name == self.low.program.root

    @property
    def dtype(self) -> str:
        return self.low.dtype

    def tensor(self, name: str) -> Value:
        entry = self.env[name]
        if isinstance(entry, Poison):
            raise Stop
        assert isinstance(entry, Value)
        return entry

    def op(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        *,
        wish: str = "",
        names: Sequence[str] = (),
        regions: Sequence[Region] = (),
        operand_spans: Sequence[Span] = (),
        **attrs: Attr,
    ) -> list[Value]:
        """Adds an operator here. Raises `TypeMismatch` unless the operands' spans are given."""

        self.low.count_operator(self.here)

        def make() -> list[Value]:
            return self.builder.add(
                kind,
                operands,
                symbols,
                names=names or ([wish] if wish else []),
                regions=regions,
                spans=(self.here,) if self.here else (),
                **attrs,
            )

        if not operand_spans:
            return make()
        place = ast.Name("", operand_spans[0].to(operand_spans[-1]))
        return self.checked(make, place, operand_spans, names)

    def weight(
        self,
        name: str,
        dims: tuple[Dim, ...],
        *,
        init: str = "normal",
        std: float | None = None,
        value: float = 0.0,
        dtype: str | None = None,
        trainable: bool = True,
        decay: bool = True,
    ) -> str:
        """Declares a weight of this block, once; the same name must mean the same tensor.

        It starts as N(value, std^2), with the `std` of the spec by default, or as ones or zeros.
        """
        if "." not in name:
            raise TypeMismatch(f"the name of a weight has two parts, as in gate.bias, not {name}")
        if "*" in name and self.stack == 1:
            raise TypeMismatch(
                f"{name} would be a weight of each layer",
                help="put the equation into a block of its own, named `model.layers.{index}`",
            )
        if std is None:
            std = self.low.initializer_range if init == "normal" else 0.0
        type = Type(dtype or self.dtype, dims)
        weight = Weight(type, init, std, trainable, self.stack, value=value, decay=decay)
        known = self.builder.graph.weights.setdefault(name, weight)
        if known != weight:
            raise TypeMismatch(f"{name} is {known.type.words} above and {weight.type.words} here")
        return name

    def checked(
        self,
        make: Callable[[], list[Value]],
        node: ast.Expr,
        spans: Sequence[Span],
        names: Sequence[str],
    ) -> list[Value]:
        """Runs `make` with this node as the place of what it adds; names its results."""
        outer, self.here = self.here, node.span
        try:
            results = make()
        except TypeMismatch as error:
            place = node.span
            if error.operand is not None and error.operand < len(spans):
                place = spans[error.operand]
            # An argument that the message names may come from a parameter of another name.
            words = set(re.findall(r"\w+", error.message))
            arguments = node.arguments if isinstance(node, ast.Call) else ()
            values = [a.value for a in arguments if a.name and a.name.value in words]
            settings = [name for value in values for name in ast.names_in(value)]
            self.error(
                "E410",
                error.message,
                None,
                "does not fit",
                help=error.help,
                span=place,
                settings=settings,
            )
        finally:
            self.here = outer
        # A cast that changes nothing makes no operator; its result keeps the name it has.
        made = self.builder.ops[-1].results if self.builder.ops else []
        for name, value in zip(names, results, strict=False):
            if value.name != name and value in made:
                self.builder.names.discard(value.name)
                value.name = self.builder.unique(name)
        return results

    def error(
        self,
        code: str,
        message: str,
        node: ast.Expr | ast.Name | None,
        label: str,
        *,
        help: str = "",
        span: Span | None = None,
        settings: Sequence[str] = (),
    ) -> NoReturn:
        """Reports a problem; where the numbers that it names, and `settings`, were set, too."""
        place = span or (node.span if node is not None else self.here)
        names = [*re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message), *settings]
        related = related_settings(names, self.bound.params, place) if place else ()
        self.low.problems.error(code, message, place, label, related, help)
        raise Stop

    # ---- numbers and names ------------------------------------------------------------------

    def const(self, node: ast.Expr) -> Any:
        """A number known when the model is built. Raises `DiagnosticError`."""
        node = self.counts(node)
        for name in ast.names_in(node):
            entry = self.env.get(name)
            if isinstance(entry, Poison):
                raise Stop
            if isinstance(entry, Value | LayerIndex):
                self.error(
                    "E222",
                    f"{name} is not known when the model is built",
                    node,
                    "needs a number",
                    help="use params, let and arithmetic here",
                )
        numbers = {n: e.value for n, e in self.env.items() if isinstance(e, Const)}
        return evaluate(node, numbers)

    def flag(self, node: ast.Expr) -> bool:
        """A condition known when the model is built. Raises `DiagnosticError`."""
        value = self.const(node)
        if not isinstance(value, bool):
            self.error(
                "E229",
                f"a condition is true or false, this is {value!r}",
                node,
                f"is {value!r}",
                help="compare it, for example with `!= 0`",
            )
        return bool(value)

    def counts(self, node: ast.Expr) -> ast.Expr:
        """`node` with every count(slot) replaced by the number of blocks in the slot."""
        match node:
            case ast.Call() if node.function.value == "count":
                return self._count(node)
            case ast.Call():
                arguments = [replace(a, value=self.counts(a.value)) for a in node.arguments]
                return replace(node, arguments=tuple(arguments))
            case ast.Unary():
                return replace(node, operand=self.counts(node.operand))
            case ast.Binary():
                return replace(node, left=self.counts(node.left), right=self.counts(node.right))
            case ast.Conditional():
                return replace(
                    node,
                    condition=self.counts(node.condition),
                    then=self.counts(node.then),
                    otherwise=self.counts(node.otherwise),
                )
            case _:
                return node

    def _count(self, node: ast.Call) -> ast.Number:
        slot = node.arguments[0].value if len(node.arguments) == 1 else None
        if not isinstance(slot, ast.Name):
            self.error(
                "E216", "count takes the name of a slot", node, "here", help="as in `count(layers)`"
            )
        assert isinstance(slot, ast.Name)
        return ast.Number(sum(g.count for g in self.groups(slot)), node.span)

    def groups(self, slot: ast.Name) -> Any:
        value = self.bound.slots.get(slot.value)
        if not isinstance(value, tuple):
            self.error(
                "E216",
                f"{slot.value} is no list of blocks",
                slot,
                "cannot be repeated",
                help=f"declare it: `slots {slot.value}`",
            )
        return value

    def dim(self, node: ast.Expr) -> Dim:
        """A dimension: its name is the expression as written, its size the value."""
        size = self.const(node)
        if not is_size(size):
            entry = self.env.get(node.value) if isinstance(node, ast.Name) else None
            place = entry.span if isinstance(entry, Const) else node.span
            self.low.not_a_size(node.span.text, size, place, ast.names_in(node), self.bound)
            raise Stop
        text = re.sub(r"\s+", "", node.span.text)
        # 1 is broadcast in any dimension.
        if not _DIM_NAME.fullmatch(text) or (text.isdigit() and text != "1"):
            self.error(
                "E230",
                "a dimension needs a name",
                node,
                f"is {size}",
                help="give the number a name with `let`, and use that",
            )
        return Dim(text, size)

    def path(self, node: ast.Expr) -> str:
        """Name of a weight, relative to this block's graph."""
        match node:
            case ast.Conditional():
                return self.path(node.then if self.flag(node.condition) else node.otherwise)
            case ast.Name():
                parts = [self._part(node.value, node)]
            case ast.Path():
                parts = [self._part(item, node) for part in node.parts for item in part]
            case _:
                self.error(
                    "E231", "this is no name of a weight", node, "here", help="as in q_a_proj"
                )
        return ".".join([*self.prefix, *parts])

    def _part(self, item: str | ast.Expr, node: ast.Expr) -> str:
        """A word, a number of at least 0, or `*` for the layer at hand."""
        if isinstance(item, ast.Name) and isinstance(self.env.get(item.value), LayerIndex):
            return "*"
        place = node if isinstance(item, str) else item
        value = item if isinstance(item, str) else self.const(item)
        if isinstance(value, str):
            problem = word_problem(value)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            problem = "a number in a name is whole and at least 0"
        else:
            problem = ""
        if problem:
            self.error(
                "E231",
                f"{value!r} cannot be in the name of a weight: {problem}",
                place,
                "in this name",
                help="names are those of a checkpoint, as in q_a_proj or model.layers.{index}",
            )
        return str(value)
