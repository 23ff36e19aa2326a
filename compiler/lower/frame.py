"""The equations of one block, turned into operators statement by statement."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Op, Region, Value, Weight
from compiler.graph.types import RUNTIME_DIMS, Dim, Type
from compiler.lower.bind import BlockRef, Bound, Const, SlotValue, names_in, related_settings
from compiler.lower.forms import FORMS, Form, Given, Kind
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import DiagnosticError
from dsl.evaluate import FUNCTIONS, evaluate
from dsl.source import Span
from dsl.suggest import nearest

if TYPE_CHECKING:
    from compiler.lower.model import Lowering

_ARITHMETIC = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
_DIM_NAME = re.compile(r"[A-Za-z_0-9]+([*+][A-Za-z_0-9]+)*")


class _Poison:
    """Stands for what could not be made; whatever follows from it is not reported again."""


POISON = _Poison()


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The index of a `repeat`: it may only stand in names, where it becomes `*`."""


Entry = Value | Const | BlockRef | LayerIndex | _Poison
Result = list[Value] | Const | _Poison


class _Stop(Exception):
    """The expression at hand cannot be made; it is reported already."""


@dataclass
class Frame:
    """A block being lowered. Inlined blocks and regions share the builder of the one around."""

    low: Lowering
    bound: Bound
    builder: Builder
    prefix: tuple[str, ...] = ()
    env: dict[str, Entry] = field(default_factory=dict)
    collected: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    stack: int = 1
    here: Span | None = None
    returned: list[Value] | None = None
    reached_return: bool = False

    @property
    def dtype(self) -> str:
        return self.low.dtype

    # ---- statements -----------------------------------------------------------------------

    def run(self, body: Sequence[ast.Statement]) -> None:
        for statement in body:
            try:
                self._statement(statement)
            except _Stop:
                self._poison(statement)
            except DiagnosticError as error:
                self.low.problems.extend(error.diagnostics)
                self._poison(statement)

    def _statement(self, statement: ast.Statement) -> None:
        self.here = statement.span
        match statement:
            case ast.Require():
                pass  # checked when the block was bound
            case ast.Let():
                value = self.const(statement.value)
                self.env[statement.name.value] = Const(value, statement.span)
            case ast.Assign():
                self._assign(statement)
            case ast.Collect():
                self.collected.append((statement.name.value, self._one(statement.value)))
            case ast.Output():
                self._output(statement)
            case ast.Alias():
                copy, original = self.path(statement.copy), self.path(statement.original)
                self.low.alias(copy, original, self.builder.graph, statement)
            case ast.If():
                chosen = statement.then if self.const(statement.condition) else statement.otherwise
                self.run(chosen)
            case ast.For():
                self._for(statement)
            case ast.Repeat():
                self._repeat(statement)
            case ast.Return():
                self.reached_return = True
                self.returned = [self._one(v) for v in statement.values]

    def _poison(self, statement: ast.Statement) -> None:
        match statement:
            case ast.Assign():
                for target in statement.targets:
                    self.env[target.value] = POISON
            case ast.Let():
                self.env[statement.name.value] = POISON
            case _:
                pass

    def _assign(self, statement: ast.Assign) -> None:
        names = [t.value for t in statement.targets]
        result = self.value(statement.value, names)
        if isinstance(result, Const):
            self._error("E213", "this is a number known when the model is built", statement.value,
                        "not a tensor", help=f"write `let {names[0]} = ..`")  # fmt: skip
        values = self._values(result)
        if len(values) != len(names):
            self._error("E214", f"{len(values)} results for {len(names)} names", statement.value,
                        f"gives {len(values)}", help="name each result once")  # fmt: skip
        for name, value in zip(names, values, strict=True):
            self.env[name] = value

    def _output(self, statement: ast.Output) -> None:
        if not self.low.is_root(self.builder.graph):
            self._error("E215", "only the outermost block of a model has outputs", statement.name,
                        "in an inner block", help="write `collect`, or return the value")  # fmt: skip
        values = self._values(self.value(statement.value, [statement.name.value]))
        self.outputs += [(statement.name.value, value) for value in values]

    def _groups(self, slot: ast.Name) -> Any:
        value = self.bound.slots.get(slot.value)
        if not isinstance(value, tuple):
            self._error("E216", f"{slot.value} is no list of blocks", slot, "cannot be repeated",
                        help=f"declare it: `slots {slot.value}`")  # fmt: skip
        return value

    def _for(self, statement: ast.For) -> None:
        index = 0
        for group in self._groups(statement.slot):
            for _ in range(group.count):
                index += 1
                self.env[statement.module.value] = group.ref
                self.env[statement.index.value] = Const(index, statement.index.span)
                self.run(statement.body)

    def _repeat(self, statement: ast.Repeat) -> None:
        carried = [n for n in _assigned(statement.body) if isinstance(self.env.get(n), Value)]
        start = 0
        for group in self._groups(statement.slot):
            before = [self._tensor(n) for n in carried]
            region = Region([self.builder.value(n, v.type) for n, v in zip(carried, before, strict=True)])
            env: dict[str, Entry] = {
                **self.env,
                **dict(zip(carried, region.args, strict=True)),
                statement.module.value: group.ref,
                statement.index.value: LayerIndex(),
            }
            inner = Frame(self.low, self.bound, self.builder, self.prefix, env)
            outer_ops, self.builder.ops = self.builder.ops, region.ops
            try:
                inner.run(statement.body)
                yields = [inner._tensor(n) for n in carried] + [v for _, v in inner.collected]
                region.ops.append(Op("yield", yields, spans=(statement.span,)))
            finally:
                self.builder.ops = outer_ops
            names = [*carried, *(n for n, _ in inner.collected)]
            results = self.op(
                "repeat", before, regions=[region], names=names, start=start, count=group.count
            )
            self.env.update(zip(carried, results, strict=False))
            self.collected += [
                (name, value)
                for (name, _), value in zip(inner.collected, results[len(carried) :], strict=True)
            ]
            start += group.count

    # ---- expressions ----------------------------------------------------------------------

    def _one(self, node: ast.Expr) -> Value:
        values = self._values(self.value(node, []))
        if len(values) != 1:
            self._error("E214", f"one tensor is needed here, this gives {len(values)}", node, "")
        return values[0]

    def _values(self, result: Result) -> list[Value]:
        if isinstance(result, _Poison):
            raise _Stop
        if isinstance(result, Const):
            self._error("E213", "a tensor is needed here, this is a number", None, "",
                        span=result.span)  # fmt: skip
        assert isinstance(result, list)
        return result

    def _tensor(self, name: str) -> Value:
        entry = self.env[name]
        if isinstance(entry, _Poison):
            raise _Stop
        assert isinstance(entry, Value)
        return entry

    def value(self, node: ast.Expr, names: Sequence[str]) -> Result:
        """Tensors or a number. `names` are those that the results will have in the graph."""
        match node:
            case ast.Name():
                return self._name(node)
            case ast.Binary() if self._holds_tensor(node):
                return self._arithmetic(node, names)
            case ast.Call() if node.function.value not in FUNCTIONS and node.function.value != "count":
                return self._call(node, names)
            case ast.Path():
                self._error("E217", "a dotted name stands for weights, not for a tensor", node, "here",
                            help="give it to an operator as `name = ..`")  # fmt: skip
        return Const(self.const(node), node.span)

    def _name(self, node: ast.Name) -> Result:
        entry = self.env.get(node.value)
        if isinstance(entry, Value):
            return [entry]
        if isinstance(entry, Const | _Poison):
            return entry
        if isinstance(entry, LayerIndex):
            self._error("E218", f"{node.value} is the number of a layer that stays symbolic", node,
                        "only names may hold it", help=f"as in `name = model.layers.{{{node.value}}}`")  # fmt: skip
        known = [n for n, e in self.env.items() if isinstance(e, Value | Const)]
        near = nearest(node.value, known)
        self._error("E219", f"{node.value} is not known here", node, "not found",
                    help=f"did you mean {near}?" if near else "assign it first, or declare it under `params`")  # fmt: skip
        raise AssertionError

    def _holds_tensor(self, node: ast.Expr) -> bool:
        match node:
            case ast.Name():
                return not isinstance(self.env.get(node.value), Const)
            case ast.Binary():
                return self._holds_tensor(node.left) or self._holds_tensor(node.right)
            case ast.Call():
                return node.function.value not in FUNCTIONS and node.function.value != "count"
            case _:
                return False

    def _arithmetic(self, node: ast.Binary, names: Sequence[str]) -> list[Value]:
        kind = _ARITHMETIC.get(node.operator)
        if kind is None:
            self._error("E220", f"`{node.operator}` does not work on tensors", None, "not for tensors",
                        span=node.operator_span, help="tensors know + - * /")  # fmt: skip
            raise AssertionError
        left, right = self.value(node.left, []), self.value(node.right, [])
        if isinstance(left, _Poison) or isinstance(right, _Poison):
            raise _Stop
        sides = (left, right)
        if isinstance(right, Const) and kind in ("mul", "div"):
            factor = self._as_number(right.value, node.right)
            by = factor if kind == "mul" else 1 / factor
            return self.op("scale", self._values(left), names=names, by=by)
        if isinstance(left, Const) and kind == "mul":
            by = self._as_number(left.value, node.left)
            return self.op("scale", self._values(right), names=names, by=by)
        operands = [self._values(side)[0] for side in sides]
        spans = [node.left.span, node.right.span]
        return self.op(kind, operands, names=names, operand_spans=spans)

    def _as_number(self, value: Any, node: ast.Expr) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            self._error("E221", "a tensor is scaled by a number other than 0", node, f"is {value!r}")
        return float(value)

    def const(self, node: ast.Expr) -> Any:
        """A number known when the model is built. Raises `DiagnosticError`."""
        for name in names_in(node):
            entry = self.env.get(name)
            if isinstance(entry, _Poison):
                raise _Stop
            if isinstance(entry, Value | LayerIndex):
                self._error("E222", f"{name} is not known when the model is built", node, "needs a number",
                            help="use params, let and arithmetic here")  # fmt: skip
        numbers = {n: e.value for n, e in self.env.items() if isinstance(e, Const)}
        return evaluate(self._counts(node), numbers)

    def _counts(self, node: ast.Expr) -> ast.Expr:
        """`node` with every count(slot) replaced by the number of blocks in the slot."""
        match node:
            case ast.Call() if node.function.value == "count" and len(node.arguments) == 1:
                slot = node.arguments[0].value
                assert isinstance(slot, ast.Name)
                return ast.Number(sum(g.count for g in self._groups(slot)), node.span)
            case ast.Binary():
                return ast.Binary(
                    node.operator, self._counts(node.left), self._counts(node.right),
                    node.span, node.operator_span,
                )  # fmt: skip
            case _:
                return node

    # ---- calls ----------------------------------------------------------------------------

    def _call(self, node: ast.Call, names: Sequence[str]) -> Result:
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
        if ref is None:
            known = [*FORMS, *self.low.binder.blocks, *self.bound.slots]
            near = nearest(name, known)
            self._error("E223", f"there is no operator or block {name}", node.function, "not found",
                        help=f"did you mean {near}?" if near else "`dslc ops` lists the operators")  # fmt: skip
            raise AssertionError
        return self._block(ref, node, names)

    def _collected(self, node: ast.Call) -> list[Value]:
        wanted = node.arguments[0].value if len(node.arguments) == 1 else None
        if not isinstance(wanted, ast.Name):
            self._error("E224", "collected takes the name of what blocks collect", node, "here",
                        help="as in `collected(balance)`")  # fmt: skip
        assert isinstance(wanted, ast.Name)
        parts = [v for n, v in self.collected if n == wanted.value]
        if parts and parts[0].type.dtype != "f32":
            return parts
        if not parts:
            return self.op("constant", value=0.0, names=[wanted.value])
        total: Value | None = None
        for part in parts:
            scalar = self.op("sum", [part], names=[wanted.value])[0] if part.type.dims else part
            total = self.op("add", [total, scalar], names=[wanted.value])[0] if total else scalar
        assert total is not None
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
                    tensors.append(self._one(argument.value))
                    value = argument.value
                    tensor_names.append(value.value if isinstance(value, ast.Name) else "entry")
                elif form.dims:
                    dims.append(self.dim(argument.value))
                else:
                    self._error("E225", f"{node.function.value} takes {len(form.tensors)} tensors", argument.value,
                                "one too many", help=f"{node.function.value}({form.signature})")  # fmt: skip
            except _Stop:
                bad = True
        missing = [n for n in form.required if n not in keywords]
        short = form.tensors is not None and len(spans) < len(form.tensors)
        if not bad and (missing or short or (form.dims and not dims)):
            what = ", ".join(missing) if missing else "a tensor" if short else "a dimension"
            self._error("E226", f"{node.function.value} needs {what}", node, "not given",
                        help=f"{node.function.value}({form.signature})")  # fmt: skip
        if bad:
            raise _Stop
        for name, (_, default) in form.optional.items():
            keywords.setdefault(name, default)
        given = Given(tensors, dims, keywords, tensor_names)
        return self._checked(lambda: form.make(self, given), node, spans, names)

    def _checked(
        self, make: Callable[[], list[Value]], node: ast.Expr, spans: Sequence[Span], names: Sequence[str]
    ) -> list[Value]:
        """Runs `make` with this node as the place of what it adds; names its results."""
        outer, self.here = self.here, node.span
        try:
            results = make()
        except TypeMismatch as error:
            place = node.span
            if error.operand is not None and error.operand < len(spans):
                place = spans[error.operand]
            self._error("E410", error.message, None, "does not fit", help=error.help, span=place)
            raise AssertionError from None
        finally:
            self.here = outer
        for name, value in zip(names, results, strict=False):
            if value.name != name and value in self.builder.ops[-1].results:
                self.builder.names.discard(value.name)
                value.name = self.builder.unique(name)
        return results

    def _unknown_keyword(self, form: Form, name: ast.Name, node: ast.Call, twice: bool) -> None:
        if twice:
            self._error("E227", f"{name.value} is given twice", name, "again", help="remove one")
        known = [*form.required, *form.optional]
        near = nearest(name.value, known)
        self._error("E227", f"{node.function.value} has no argument {name.value}", name, "not known there",
                    help=f"did you mean {near}?" if near else f"{node.function.value}({form.signature})")  # fmt: skip

    def _convert(self, kind: Kind, node: ast.Expr) -> Any:
        if kind is Kind.DIM:
            return self.dim(node)
        if kind is Kind.PATH:
            return self.path(node)
        if kind is Kind.AXIS:
            if not isinstance(node, ast.Name) or node.value not in RUNTIME_DIMS:
                self._error("E228", "this is no run-time dimension", node, "here",
                            help=f"one of {', '.join(RUNTIME_DIMS)}")  # fmt: skip
            assert isinstance(node, ast.Name)
            return node.value
        if kind is Kind.BLOCK:
            return self._slot_argument(node)
        value = self.const(node)
        fits = {
            Kind.NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
            Kind.INT: isinstance(value, int) and not isinstance(value, bool),
            Kind.TEXT: isinstance(value, str),
            Kind.FLAG: isinstance(value, bool),
        }[kind]
        if not fits:
            self._error("E229", f"{kind.value} is needed here, this is {value!r}", node, f"is {value!r}")
        return value

    def dim(self, node: ast.Expr) -> Dim:
        """A dimension: its name is the expression as written, its size the value."""
        size = self.const(node)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            self._error("E406", f"a dimension is a whole number of at least 1, this is {size!r}", node, f"is {size!r}")
        text = re.sub(r"\s+", "", node.span.text)
        if not _DIM_NAME.fullmatch(text) or text.isdigit():
            self._error("E230", "a dimension needs a name", node, f"is {size}",
                        help="give the number a name with `let`, and use that")  # fmt: skip
        return Dim(text, size)

    def path(self, node: ast.Expr) -> str:
        """Name of a weight, relative to this block's graph."""
        match node:
            case ast.Conditional():
                return self.path(node.then if self.const(node.condition) else node.otherwise)
            case ast.Name():
                parts = [node.value]
            case ast.Path():
                parts = [self._part(item) for part in node.parts for item in part]
            case _:
                self._error("E231", "this is no name of a weight", node, "here", help="as in q_a_proj")
                raise AssertionError
        return ".".join([*self.prefix, *parts])

    def _part(self, item: str | ast.Expr) -> str:
        if isinstance(item, str):
            return item
        if isinstance(item, ast.Name) and isinstance(self.env.get(item.value), LayerIndex):
            return "*"
        return str(self.const(item))

    def _slot_argument(self, node: ast.Expr) -> SlotValue:
        if isinstance(node, ast.Name):
            entry = self.env.get(node.value)
            if isinstance(entry, BlockRef):
                return entry
            if node.value in self.bound.slots:
                return self.bound.slots[node.value]
        numbers = {n: e for n, e in self.env.items() if isinstance(e, Const)}
        ref = self.low.binder.reference(node, numbers)
        if ref is None:
            raise _Stop
        return ref

    # ---- blocks inside blocks --------------------------------------------------------------

    def _block(self, ref: BlockRef, node: ast.Call, names: Sequence[str]) -> list[Value]:
        """A call of another graph when it has a name of its own, else its equations in place."""
        params = {p.name.value for p in ref.block.params}
        slot_names = {s.name.value for s in ref.block.slots}
        operands: list[Value] = []
        spans: list[Span] = []
        arguments: dict[str, Const] = {}
        slots: dict[str, SlotValue] = {}
        path: str | None = None
        bad = False
        for argument in node.arguments:
            key = argument.name.value if argument.name else None
            try:
                if key is None:
                    spans.append(argument.span)
                    operands.append(self._one(argument.value))
                elif key == "name" and key not in params:
                    path = self.path(argument.value)
                elif key in slot_names:
                    slots[key] = self._slot_argument(argument.value)
                else:
                    arguments[key] = Const(self.const(argument.value), argument.span)
            except _Stop:
                bad = True
        bound = self.low.binder.bind(ref, arguments, slots)
        if bad or bound is None:
            raise _Stop
        if len(operands) != len(ref.block.arguments):
            wanted = ", ".join(a.name.value for a in ref.block.arguments)
            self._error("E225", f"{ref.block.name.value} takes {wanted}", node,
                        f"{len(operands)} tensors given")  # fmt: skip
        if path is None:
            return self.inline(bound, operands, node, spans)
        callee = self.low.graph(bound, operands, node.span)
        if callee is None:
            raise _Stop

        def make() -> list[Value]:
            wishes = [*names, *callee.result_names[len(names) :]]
            return self.op("call", operands, names=wishes, callee=callee.name, scope=path)

        results = self._checked(make, node, spans, names)
        declared = len(ref.block.results)
        self.collected += zip(callee.result_names[declared:], results[declared:], strict=True)
        return results[:declared]

    def inline(
        self, bound: Bound, operands: Sequence[Value], node: ast.Expr, spans: Sequence[Span]
    ) -> list[Value]:
        """The equations of a block written out here; its weights are named as this block's own."""
        inner = Frame(
            self.low, bound, self.builder, self.prefix, dict(bound.params), self.collected,
            self.outputs, self.stack,
        )  # fmt: skip

        def match() -> list[Value]:
            self.low.match_arguments(bound, operands)
            return []

        self._checked(match, node, spans, [])
        inner.env.update(zip((a.name.value for a in bound.block.arguments), operands, strict=True))
        inner.run(bound.block.body)
        if inner.returned is None:
            raise _Stop
        return inner.returned

    def experts(self, tensors: list[Value], count: Dim, ref: Any, path: str) -> list[Value]:
        """The `experts` operator: one expert's equations as its region, weights under `path.*`."""
        x = tensors[0]
        score = tensors[1].type
        bound = self.low.binder.bind(ref, {}, {})
        if bound is None:
            raise _Stop
        if not x.type.dims or not score.dims:
            raise TypeMismatch("experts needs tokens", 0)
        token = self.builder.value("z", Type(x.type.dtype, (Dim("token"), x.type.last)))
        region = Region([token])
        inner = Frame(
            self.low, self.bound, self.builder, (path, "*"), dict(self.env), stack=count.size or 1,
            here=self.here,
        )  # fmt: skip
        outer_ops, self.builder.ops = self.builder.ops, region.ops
        try:
            results = inner.inline(bound, [token], ast.Name("expert", ref.span), [ref.span])
            region.ops.append(Op("yield", results, spans=(ref.span,)))
        finally:
            self.builder.ops = outer_ops
        return self.op("experts", tensors, regions=[region], count=count.size or 1)

    # ---- making operators ------------------------------------------------------------------

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

        def make() -> list[Value]:
            return self.builder.add(
                kind, operands, symbols, names=names or ([wish] if wish else []), regions=regions,
                spans=(self.here,) if self.here else (), **attrs,
            )  # fmt: skip

        if not operand_spans:
            return make()
        place = ast.Name("", operand_spans[0].to(operand_spans[-1]))
        return self._checked(make, place, operand_spans, names)

    def weight(
        self,
        name: str,
        dims: tuple[Dim, ...],
        *,
        init: str = "normal",
        dtype: str | None = None,
        trainable: bool = True,
    ) -> str:
        """Declares a weight of this block, once; the same name must mean the same tensor."""
        std = self.low.initializer_range if init == "normal" else 0.0
        weight = Weight(Type(dtype or self.dtype, dims), init, std, trainable, self.stack)
        known = self.builder.graph.weights.setdefault(name, weight)
        if known != weight:
            raise TypeMismatch(f"{name} is {known.type.words} above and {weight.type.words} here")
        return name

    def _error(
        self, code: str, message: str, node: ast.Expr | ast.Name | None, label: str,
        *, help: str = "", span: Span | None = None,
    ) -> None:  # fmt: skip
        place = span or (node.span if node is not None else self.here)
        related = related_settings(message, self.bound.params, place) if place else ()
        self.low.problems.error(code, message, place, label, related, help)
        raise _Stop


def _assigned(body: Sequence[ast.Statement]) -> list[str]:
    """Names that statements assign, in order, each once."""
    found: dict[str, None] = {}
    for statement in body:
        match statement:
            case ast.Assign():
                for target in statement.targets:
                    found.setdefault(target.value)
            case ast.If():
                for name in _assigned([*statement.then, *statement.otherwise]):
                    found.setdefault(name)
            case _:
                pass
    return list(found)


