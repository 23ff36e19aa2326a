"""A block being lowered: what calls of other blocks in it mean, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Region, Value, substitute
from compiler.graph.types import Dim, Type
from compiler.lower.bind import BlockRef, Bound, Const, SlotValue
from compiler.lower.expressions import Expressions, tensors_of
from compiler.lower.extern import extern_attributes
from compiler.lower.names import name_problems
from compiler.lower.scope import POISON, Entry
from compiler.lower.state import Lowering, Stop, leading_dims
from compiler.lower.statements import run
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.source import Span


@dataclass
class _Use:
    """Arguments of a call of a block, by what they are."""

    operands: list[Value] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    arguments: dict[str, Const] = field(default_factory=dict)
    slots: dict[str, SlotValue] = field(default_factory=dict)
    path: str | None = None
    poisoned: bool = False


def start(low: Lowering, name: str, bound: Bound, types: Sequence[Type]) -> Frame:
    """A block that becomes a graph of this name, before its equations."""
    block = bound.block
    args = [Value(a.name.value, t) for a, t in zip(block.arguments, types, strict=True)]
    graph = Graph(name, args, about=block.about, span=block.span)
    env: dict[str, Entry] = {**bound.params, **{v.name: v for v in args}}
    return Frame(low, bound, Builder(graph, low.program.graphs), env=env)


class Frame(Expressions):
    """The equations of one block, turned into operators."""

    def run(self) -> None:
        run(self, self.bound.block.body)

    def finish(self, results: Sequence[Value], names: Sequence[str]) -> Graph:
        """Ends the graph of this block."""
        graph = self.builder.graph
        graph.result_names = tuple(names)
        if not self.low.problems:  # what is missing for another reason is not missed twice
            self.low.problems.extend(name_problems(graph))
        graph.ops.append(Op("return", list(results), spans=(self.bound.block.span,)))
        return graph

    def block(self, ref: BlockRef, node: ast.Call, names: Sequence[str]) -> list[Value]:
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
                f"{ref.block.name.value} takes {tensors_of(len(wanted))}, not {len(use.operands)}",
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
        callee = self._callee(bound, use.operands, node.span)

        def make() -> list[Value]:
            self.low.match_arguments(bound, use.operands)
            wishes = [*names, *callee.result_names[len(names) :]]
            return self.op("call", use.operands, names=wishes, callee=callee.name, scope=path)

        results = self.checked(make, node, use.spans, names)
        declared = len(ref.block.results)
        self.collected += zip(callee.result_names[declared:], results[declared:], strict=True)
        return results[:declared]

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
                    use.slots[key] = self.slot_argument(argument.value)
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
            inner = Frame(self.low, bound, self.builder, self.prefix, env)
            with self.low.nested(node.span):
                inner.run()
        elif not any(dim.value == ".." for a in block.arguments for dim in a.type.dims):
            self._callee(bound, [], node.span)
        raise Stop

    def _callee(self, bound: Bound, operands: Sequence[Value], use: Span) -> Graph:
        """The graph of a block with these numbers, made once. Raises `Stop` if it has problems."""
        low, block = self.low, bound.block
        leading = leading_dims(block, operands)
        key = (bound.key, leading)
        if key in low.open:
            low.endless(use)
        if key not in low.graphs:
            low.graphs[key] = None  # unless it is made without a problem
            found = len(low.problems)
            types = [low.type(a.type, bound, leading) for a in block.arguments]
            inner = start(low, f"{block.name.value}#{len(low.bounds)}", bound, types)
            low.open.add(key)
            try:
                results = inner.results(use, leading, {})
            finally:
                low.open.discard(key)
            names = [
                r.name.value if isinstance(r, ast.Value) else block.name.value.lower()
                for r in block.results
            ]
            collected = inner.collected
            made = inner.finish(
                [*results, *(v for _, v in collected)], [*names, *(n for n, _ in collected)]
            )
            if len(low.problems) == found:
                low.bounds[made.name] = bound
                low.graphs[key] = low.program.graphs[made.name] = made
        graph = low.graphs[key]
        if graph is None:
            raise Stop
        return graph

    def results(self, use: Span, leading: tuple[Dim, ...], dims: Mapping[str, Dim]) -> list[Value]:
        """What the block returns, of the types that it declares. Raises `Stop` if it does not.

        `leading` is what `..` is bound to here, `dims` what its run-time dimensions are bound to.
        """
        block, low = self.bound.block, self.low
        with low.nested(use):
            self.run()
        if self.returned is None or self.returns is None:
            if self.returns is None:
                low.problems.error(
                    "E235",
                    f"{block.name.value} returns nothing",
                    block.name.span,
                    "no `return` is reached",
                    help="end the block with `return ..`",
                )
            raise Stop
        if len(self.returned) != len(block.results):
            low.problems.error(
                "E236",
                f"{block.name.value} declares {len(block.results)} results,"
                f" not {len(self.returned)}",
                self.returns.span,
                "here",
                help="let the two agree",
            )
            return self.returned
        for declared, value, node in zip(
            block.results, self.returned, self.returns.values, strict=True
        ):
            annotation = declared.type if isinstance(declared, ast.Value) else declared
            type = substitute(low.type(annotation, self.bound, leading), dims)
            if type != value.type and not {d.name for d in type.dims} & low.unknown:
                low.problems.error(
                    "E411",
                    f"{block.name.value} declares {type}, and returns {value.type}",
                    node.span,
                    f"is {value.type}",
                )
        return self.returned

    def inline(
        self, bound: Bound, operands: Sequence[Value], node: ast.Expr, spans: Sequence[Span]
    ) -> list[Value]:
        """The equations of a block written out here; its weights are named as this block's own."""
        inner = Frame(
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
        return inner.results(node.span, leading_dims(bound.block, operands), dims)

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
            attrs = extern_attributes(self.low, bound, function)
            kind = "extern" if function.per == "token" else "sequence_extern"
            return self.op(kind, use.operands, names=names, wish=block.name.value, **attrs)

        return self.checked(make, node, use.spans, names)

    def experts(
        self, tensors: list[Value], count: Dim, ref: BlockRef, path: str, **attrs: Any
    ) -> list[Value]:
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
        inner = Frame(
            self.low,
            self.bound,
            self.builder,
            (path, "*"),
            dict(self.env),
            stack=count.size or 1,
            inside="region",
            here=self.here,
        )
        with self.builder.into(region.ops):
            results = inner.inline(bound, [token], ast.Name("expert", ref.span), [ref.span])
            region.ops.append(Op("yield", results, spans=(ref.span,)))
        if inner.collected:
            raise TypeMismatch(f"an expert cannot collect {inner.collected[0][0]}")
        return self.op("experts", tensors, regions=[region], count=count.size or 1, **attrs)
