"""Expressions of a block: numbers known when the model is built, tensors, dimensions, names."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compiler.graph.core import Value
from compiler.graph.types import Dim
from compiler.lower.bind import Const
from compiler.lower.forms import FORMS
from compiler.lower.names import word_problem
from compiler.lower.scope import POISON, LayerIndex, Poison, Result, Scope, Stop
from dsl import ast
from dsl.evaluate import FUNCTIONS, evaluate
from dsl.suggest import nearest

Attrs = dict[str, Any]

_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
_DIM_NAME = re.compile(r"[A-Za-z_0-9]+([*+][A-Za-z_0-9]+)*")


class Expressions(Scope):
    """Values of expressions. Calls of operators and blocks are left to the class above."""

    @abstractmethod
    def call(self, node: ast.Call, names: Sequence[str]) -> list[Value]:
        """Results of an operator or a block."""

    def value(self, node: ast.Expr, names: Sequence[str]) -> Result:
        """Tensors or a number. `names` are those that the results will have in the graph."""
        match node:
            case ast.Name():
                return self._name(node)
            case ast.Binary() if self._holds_tensor(node):
                return self._arithmetic(node, names)
            case ast.Unary() if self._holds_tensor(node):
                if node.operator == "-":
                    x = self.one(node.operand)
                    spans = [node.operand.span]
                    return self.op("scale", [x], names=names, operand_spans=spans, by=-1.0)
                self.error(
                    "E220",
                    f"`{node.operator}` does not work on a tensor",
                    node,
                    "not for tensors",
                    help="conditions are of numbers",
                )
            case ast.Call() if self._holds_tensor(node):
                return self.call(node, names)
            case ast.Conditional() if self._holds_tensor(node):
                chosen = node.then if self.flag(node.condition) else node.otherwise
                return self.value(chosen, names)
            case ast.Path():
                self.error(
                    "E217",
                    "a dotted name stands for weights, not for a tensor",
                    node,
                    "here",
                    help="give it to an operator as `name = ..`",
                )
        return Const(self.const(node), node.span)

    def one(self, node: ast.Expr) -> Value:
        return self.single(self.value(node, []), node)

    def single(self, result: Result, node: ast.Expr) -> Value:
        """The only tensor that `node` gave."""
        values = self.values(result, node)
        if len(values) != 1:
            self.error(
                "E214",
                f"one tensor is needed here, this gives {len(values)}",
                node,
                f"gives {len(values)}",
                help="assign them to names first: `a, b = ..`",
            )
        return values[0]

    def values(self, result: Result, node: ast.Expr) -> list[Value]:
        """The tensors that `node` gave."""
        if isinstance(result, Poison):
            raise Stop
        if isinstance(result, Const):
            self.error(
                "E213",
                "a tensor is needed here, this is a number",
                node,
                f"is {result.value!r}",
                help="arithmetic takes numbers beside a tensor: `1 - x`, `x * 2`",
            )
        assert isinstance(result, list)
        return result

    def _name(self, node: ast.Name) -> Result:
        entry = self.env.get(node.value)
        if isinstance(entry, Value):
            return [entry]
        if isinstance(entry, Const | Poison):
            return entry
        if isinstance(entry, LayerIndex):
            self.error(
                "E218",
                f"{node.value} is the number of a layer that stays symbolic",
                node,
                "only names may hold it",
                help=f"as in `name = model.layers.{{{node.value}}}`",
            )
        known = [n for n, e in self.env.items() if isinstance(e, Value | Const)]
        near = nearest(node.value, known)
        self.error(
            "E219",
            f"{node.value} is not known here",
            node,
            "not found",
            help=f"did you mean {near}?"
            if near
            else "assign it first, or declare it under `params`",
        )

    def _holds_tensor(self, node: ast.Expr) -> bool:
        match node:
            case ast.Name():
                return not isinstance(self.env.get(node.value), Const)
            case ast.Binary():
                return self._holds_tensor(node.left) or self._holds_tensor(node.right)
            case ast.Unary():
                return self._holds_tensor(node.operand)
            case ast.Conditional():
                return self._holds_tensor(node.then) or self._holds_tensor(node.otherwise)
            case ast.Call() if node.function.value in FUNCTIONS:  # some are for tensors, too
                return node.function.value in FORMS and any(
                    self._holds_tensor(argument.value) for argument in node.arguments
                )
            case ast.Call():
                return node.function.value != "count"
            case _:
                return False

    def _arithmetic(self, node: ast.Binary, names: Sequence[str]) -> list[Value]:
        kind = _ARITHMETIC.get(node.operator)
        if kind is None:
            self.error(
                "E220",
                f"`{node.operator}` does not work on tensors",
                None,
                "not for tensors",
                span=node.operator_span,
                help="tensors know + - * /",
            )
        try:
            left = self.value(node.left, [])
        except Stop:
            left = POISON
        right = self.value(node.right, [])
        if isinstance(left, Poison) or isinstance(right, Poison):
            raise Stop
        spans = [node.left.span, node.right.span]
        if isinstance(right, Const):
            x, number = self.single(left, node.left), self._as_number(right.value, node.right)
            kind, attrs = self._with_number(node.operator, number, node.right)
            return self.op(kind, [x], names=names, operand_spans=spans[:1], **attrs)
        if isinstance(left, Const):
            number, x = self._as_number(left.value, node.left), self.single(right, node.right)
            kind, attrs = self._of_number(number, node.operator, node.left)
            return self.op(kind, [x], names=names, operand_spans=spans[1:], **attrs)
        operands = [self.single(left, node.left), self.single(right, node.right)]
        return self.op(kind, operands, names=names, operand_spans=spans)

    def _with_number(self, operator: str, number: float, node: ast.Expr) -> tuple[str, Attrs]:
        """The operator of `x operator number`."""
        if operator in ("+", "-"):
            return "shift", {"by": number if operator == "+" else -number, "negated": False}
        self._not_zero(number, node)
        return "scale", {"by": number if operator == "*" else 1 / number}

    def _of_number(self, number: float, operator: str, node: ast.Expr) -> tuple[str, Attrs]:
        """The operator of `number operator x`."""
        if operator in ("+", "-"):
            return "shift", {"by": number, "negated": operator == "-"}
        self._not_zero(number, node)
        return "scale" if operator == "*" else "reciprocal", {"by": number}

    def _not_zero(self, number: float, node: ast.Expr) -> None:
        if number == 0:
            self.error(
                "E221",
                "a tensor is scaled by a number other than 0",
                node,
                f"is {number:g}",
                help="leave the term out, or choose another number",
            )

    def _as_number(self, value: Any, node: ast.Expr) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.error(
                "E221",
                "arithmetic of a tensor is with a number or a tensor",
                node,
                f"is {value!r}",
                help="leave the term out, or choose a number",
            )
        return float(value)

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
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            entry = self.env.get(node.value) if isinstance(node, ast.Name) else None
            place = entry.span if isinstance(entry, Const) else node.span
            self.low.not_a_size(node.span.text, size, place, ast.names_in(node), self.bound)
            raise Stop
        text = re.sub(r"\s+", "", node.span.text)
        # 1 is broadcast, whatever it counts.
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
