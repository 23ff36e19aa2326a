"""Calls in a block: operators, other blocks, experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from compiler.graph.core import Op, Region, Value
from compiler.graph.types import RUNTIME_DIMS, Dim, Type
from compiler.lower.bind import BlockRef, Bound, Const, SlotValue
from compiler.lower.expressions import Expressions
from compiler.lower.forms import FORMS, Form, Given, Kind
from compiler.lower.mask import lower_mask
from compiler.lower.scope import POISON, Entry, Stop
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.source import Span
from dsl.suggest import nearest


@dataclass
class _Use:
    """Arguments of a call of a block, by what they are."""

    operands: list[Value] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    arguments: dict[str, Const] = field(default_factory=dict)
    slots: dict[str, SlotValue] = field(default_factory=dict)
    path: str | None = None
    poisoned: bool = False


class Calls(Expressions):
    """What `f(x, ..)` means. Running the statements of a block is left to the class above."""

    @abstractmethod
    def run(self, body: Sequence[ast.Statement]) -> None:
        """Lowers statements in order."""

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
        return self._block(ref, node, names)

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
                        f"{node.function.value} takes {_tensors(len(form.tensors))}",
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
            slot = self._slot_argument(node)
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
            raise Stop
        return ref

    def _block(self, ref: BlockRef, node: ast.Call, names: Sequence[str]) -> list[Value]:
        """A call of another graph when it has a name of its own, else its equations in place."""
        use = self._use(ref, node)
        bound = self.low.binder.bind(ref, use.arguments, use.slots)
        if bound is None:
            raise Stop
        if use.poisoned:
            self._look_inside(bound, use, node)
        if len(use.operands) != len(ref.block.arguments):
            wanted = [a.name.value for a in ref.block.arguments]
            self.error(
                "E225",
                f"{ref.block.name.value} takes {_tensors(len(wanted))}, not {len(use.operands)}",
                node,
                "in this call",
                help=f"give it {', '.join(wanted)}",
            )
        if ref.block.function is not None:
            return self._extern(bound, ref.block.function, use, node, names)
        path = use.path
        if path is None:
            return self.inline(bound, use.operands, node, use.spans)
        if self.prefix:
            self.error(
                "E239",
                "a block inside an expert has no name of its own",
                node,
                "named here",
                help="leave `name` out: its weights become those of the expert",
            )
        callee = self.low.graph(bound, use.operands, node.span)
        if callee is None:
            raise Stop

        def make() -> list[Value]:
            self.low.match_arguments(bound, use.operands)
            wishes = [*names, *callee.result_names[len(names) :]]
            return self.op("call", use.operands, names=wishes, callee=callee.name, scope=path)

        results = self.checked(make, node, use.spans, names)
        declared = len(ref.block.results)
        self.collected += zip(callee.result_names[declared:], results[declared:], strict=True)
        return results[:declared]

    def _extern(
        self,
        bound: Bound,
        function: ast.Function,
        use: _Use,
        node: ast.Call,
        names: Sequence[str],
    ) -> list[Value]:
        """An operator that a function of the user computes."""
        block = bound.block
        if use.path is not None:
            self.error(
                "E239",
                f"{block.name.value} is an extern: it has no weights, and so no name",
                node,
                "named here",
                help="leave `name` out",
            )

        def make() -> list[Value]:
            attrs = self.low.externs.attributes(bound, function)
            kind = "extern" if function.per == "token" else "sequence_extern"
            return self.op(kind, use.operands, names=names, wish=block.name.value, **attrs)

        return self.checked(make, node, use.spans, names)

    def _use(self, ref: BlockRef, node: ast.Call) -> _Use:
        params = {p.name.value for p in ref.block.params}
        slots = {s.name.value for s in ref.block.slots}
        use = _Use()
        bad = False
        for argument in node.arguments:
            key = argument.name.value if argument.name else None
            try:
                if key is None:
                    use.poisoned = True
                    use.spans.append(argument.span)
                    use.operands.append(self.one(argument.value))
                    use.poisoned = len(use.operands) < len(use.spans)
                elif key == "name" and key not in params:
                    use.path = self.path(argument.value)
                elif key in slots:
                    use.slots[key] = self._slot_argument(argument.value)
                else:
                    use.arguments[key] = Const(self.const(argument.value), argument.span)
            except Stop:
                bad |= key is not None
        if bad:
            raise Stop
        return use

    def _look_inside(self, bound: Bound, use: _Use, node: ast.Call) -> NoReturn:
        """Reports the mistakes of a block though a tensor it is given could not be made."""
        block = bound.block
        if use.path is None:
            env: dict[str, Entry] = {**bound.params}
            env.update((a.name.value, POISON) for a in block.arguments)
            inner = type(self)(self.low, bound, self.builder, self.prefix, env)
            with self.low.nested(node.span):
                inner.run(block.body)
        elif not any(dim.value == ".." for a in block.arguments for dim in a.type.dims):
            self.low.graph(bound, [], node.span)
        raise Stop

    def inline(
        self, bound: Bound, operands: Sequence[Value], node: ast.Expr, spans: Sequence[Span]
    ) -> list[Value]:
        """The equations of a block written out here; its weights are named as this block's own."""
        inner = type(self)(
            self.low,
            bound,
            self.builder,
            self.prefix,
            dict(bound.params),
            self.collected,
            self.outputs,
            self.stack,
            "region" if self.inside else "",
        )

        dims: dict[str, Dim] = {}

        def match() -> list[Value]:
            dims.update(self.low.match_arguments(bound, operands))
            return []

        self.checked(match, node, spans, [])
        inner.env.update(zip((a.name.value for a in bound.block.arguments), operands, strict=True))
        with self.low.nested(node.span):
            inner.run(bound.block.body)
        if inner.returned is None:
            if inner.returns is None:
                self.low.returns_nothing(bound)
            raise Stop
        assert inner.returns is not None
        leading = leading_dims(bound.block, operands)
        self.low.check_results(bound, inner.returns, inner.returned, leading, dims)
        return inner.returned

    def experts(self, tensors: list[Value], count: Dim, ref: Any, path: str) -> list[Value]:
        """The `experts` operator: one expert's equations as its region, weights under `path.*`."""
        if self.prefix:
            raise TypeMismatch("an expert cannot hold experts of its own")
        x = tensors[0]
        score = tensors[1].type
        bound = self.low.binder.bind(ref, {}, {})
        if bound is None:
            raise Stop
        if not x.type.dims or not score.dims:
            raise TypeMismatch("experts needs tokens", 0)
        token = self.builder.value("z", Type(x.type.dtype, (Dim("token"), x.type.last)))
        region = Region([token])
        inner = type(self)(
            self.low,
            self.bound,
            self.builder,
            (path, "*"),
            dict(self.env),
            stack=count.size or 1,
            inside="region",
            here=self.here,
        )
        outer_ops, self.builder.ops = self.builder.ops, region.ops
        try:
            results = inner.inline(bound, [token], ast.Name("expert", ref.span), [ref.span])
            region.ops.append(Op("yield", results, spans=(ref.span,)))
        finally:
            self.builder.ops = outer_ops
        if inner.collected:
            raise TypeMismatch(f"an expert cannot collect {inner.collected[0][0]}")
        return self.op("experts", tensors, regions=[region], count=count.size or 1)


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def leading_dims(block: ast.Block, operands: Sequence[Value]) -> tuple[Dim, ...]:
    """What `..` stands for in the signature of a block with these operands."""
    for argument, value in zip(block.arguments, operands, strict=False):
        if any(dim.value == ".." for dim in argument.type.dims):
            return value.type.dims[:-1]
    return ()
