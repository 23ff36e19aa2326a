"""Expressions of a block: numbers known when the model is built, tensors, dimensions, names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from compiler.graph.core import Value
from compiler.graph.types import RUNTIME_DIMS, Dim
from compiler.lower.bind import BlockRef, Const, SlotValue
from compiler.lower.forms import FORMS, Form, Given, Kind
from compiler.lower.mask import lower_mask
from compiler.lower.scope import POISON, LayerIndex, Poison, Result, Scope
from compiler.lower.state import Stop
from dsl import ast
from dsl.evaluate import FUNCTIONS
from dsl.source import Span
from dsl.suggest import nearest

Attrs = dict[str, Any]

_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div"}


class Expressions(Scope):
    """Values of expressions. Calls of blocks are left to the class above."""

    @abstractmethod
    def block(self, ref: BlockRef, node: ast.Call, names: Sequence[str]) -> list[Value]:
        """A call of a block: of its graph if it has a name of its own, else its equations here."""

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

    # ---- calls --------------------------------------------------------------------------

    def call(self, node: ast.Call, names: Sequence[str]) -> list[Value]:
        name = node.function.value
        if name == "collected":
            return self._collected(node)
        # A slot may bear the name of an operator: `attention` in a layer is the block chosen there.
        entry = self.env.get(name) or self.bound.slots.get(name)
        ref = entry if isinstance(entry, BlockRef) else None
        if ref is None and name in FORMS:
            return self._form(FORMS[name], node, names)
        if ref is None and name in self.low.binder.blocks:
            ref = BlockRef(self.low.binder.blocks[name], node.function.span)
        if ref is None and name in self.bound.slots:
            self.error(
                "E210",
                f"{name} is a list of blocks, and is not called itself",
                node.function,
                "is a list",
                help=f"call each: `repeat layer, index in {name}:`",
            )
        if ref is None:
            known = [*FORMS, *self.low.binder.blocks, *self.bound.slots]
            near = nearest(name, known)
            self.error(
                "E223",
                f"there is no operator or block {name}",
                node.function,
                "not found",
                help=f"did you mean {near}?" if near else "`dslc ops` lists the operators",
            )
        return self.block(ref, node, names)

    def _collected(self, node: ast.Call) -> list[Value]:
        wanted = node.arguments[0].value if len(node.arguments) == 1 else None
        if not isinstance(wanted, ast.Name):
            self.error(
                "E224",
                "collected takes the name of what blocks collect",
                node,
                "here",
                help="as in `collected(balance)`",
            )
        assert isinstance(wanted, ast.Name)
        parts = [v for n, v in self.collected if n == wanted.value]
        if parts and parts[0].type.dtype != "f32":
            return parts
        if not parts:
            return self.op("constant", value=0.0, names=[wanted.value])
        total, *others = [
            self.op("sum", [p], names=[wanted.value])[0] if p.type.dims else p for p in parts
        ]
        for part in others:
            (total,) = self.op("add", [total, part], names=[wanted.value])
        return [total]

    def _form(self, form: Form, node: ast.Call, names: Sequence[str]) -> list[Value]:
        tensors: list[Value] = []
        spans: list[Span] = []
        dims: list[Dim] = []
        tensor_names: list[str] = []
        keywords: dict[str, Any] = {}
        kinds = {**form.required, **{n: k for n, (k, _) in form.optional.items()}}
        bad = False
        for argument in node.arguments:
            try:
                if argument.name is not None:
                    key = argument.name.value
                    if key not in kinds or key in keywords:
                        self._unknown_keyword(form, argument.name, node, key in keywords)
                    keywords[key] = self._convert(kinds[key], argument.value)
                elif form.tensors is None or len(spans) < len(form.tensors):
                    spans.append(argument.span)
                    tensors.append(self.one(argument.value))
                    value = argument.value
                    tensor_names.append(value.value if isinstance(value, ast.Name) else "entry")
                elif form.dims:
                    dims.append(self.dim(argument.value))
                else:
                    self.error(
                        "E225",
                        f"{node.function.value} takes {tensors_of(len(form.tensors))}",
                        argument.value,
                        "one too many",
                        help=f"{node.function.value}({form.signature})",
                    )
            except Stop:
                bad = True
        missing = [n for n in form.required if n not in keywords]
        short = len(spans) < sum(not name.endswith("?") for name in form.tensors or ())
        if not bad and (missing or short or (form.dims and not dims)):
            what = (
                ", ".join(f"`{n} = ..`" for n in missing)
                if missing
                else "a tensor"
                if short
                else "a dimension"
            )
            self.error(
                "E226",
                f"{node.function.value} needs {what}",
                node,
                "not given",
                help=f"{node.function.value}({form.signature})",
            )
        if bad:
            raise Stop
        for name, (_, default) in form.optional.items():
            keywords.setdefault(name, default)
        given = Given(tensors, dims, keywords, tensor_names)
        return self.checked(lambda: form.make(self, given), node, spans, names)

    def _unknown_keyword(self, form: Form, name: ast.Name, node: ast.Call, twice: bool) -> None:
        if twice:
            self.error("E227", f"`{name.value}` is given twice", name, "again", help="remove one")
        known = [*form.required, *form.optional]
        near = nearest(name.value, known)
        self.error(
            "E227",
            f"{node.function.value} has no argument {name.value}",
            name,
            "not known there",
            help=f"did you mean {near}?" if near else f"{node.function.value}({form.signature})",
        )

    def _convert(self, kind: Kind, node: ast.Expr) -> Any:
        if kind is Kind.DIM:
            return self.dim(node)
        if kind is Kind.PATH:
            return self.path(node)
        if kind is Kind.AXIS:
            if not isinstance(node, ast.Name) or node.value not in RUNTIME_DIMS:
                self.error(
                    "E228",
                    "this is no run-time dimension",
                    node,
                    "here",
                    help=f"one of {', '.join(RUNTIME_DIMS)}",
                )
            assert isinstance(node, ast.Name)
            return node.value
        if kind is Kind.BLOCK:
            slot = self.slot_argument(node)
            if not isinstance(slot, BlockRef):
                self.error(
                    "E210",
                    "one block is needed here, this is a list",
                    node,
                    "is a list",
                    help="name a block, or a slot for one",
                )
            return slot
        if kind is Kind.MASK:
            return lower_mask(self, node)
        if kind is Kind.TENSOR:
            return self.one(node)
        value = self.const(node)
        fits = {
            Kind.NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
            Kind.INT: isinstance(value, int) and not isinstance(value, bool),
            Kind.TEXT: isinstance(value, str),
            Kind.FLAG: isinstance(value, bool),
        }[kind]
        if not fits:
            self.error(
                "E229",
                f"{kind.value} is needed here, this is {value!r}",
                node,
                f"is {value!r}",
                help="`dslc ops NAME` shows what a function takes",
            )
        return value

    def slot_argument(self, node: ast.Expr) -> SlotValue:
        if isinstance(node, ast.Name):
            entry = self.env.get(node.value)
            if isinstance(entry, BlockRef):
                return entry
            if node.value in self.bound.slots:
                return self.bound.slots[node.value]
        numbers = {n: e for n, e in self.env.items() if isinstance(e, Const)}
        ref = self.low.binder.reference(node, numbers)
        if ref is None:
            raise Stop
        return ref


def tensors_of(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"
