"""Statements of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from compiler.graph.core import Op, Region, Value
from compiler.lower.bind import Const
from compiler.lower.calls import Calls
from compiler.lower.scope import POISON, Entry, LayerIndex, Stop
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import DiagnosticError

MAX_COPIES = 1_000  # of the lines of a `for`


class Frame(Calls):
    """The equations of one block, turned into operators statement by statement."""

    def run(self, body: Sequence[ast.Statement]) -> None:
        for statement in body:
            try:
                self._statement(statement)
            except Stop:
                self._poison(statement)
            except DiagnosticError as error:
                self.low.problems.extend(error.diagnostics)
                self._poison(statement)
            except TypeMismatch as error:
                place = self.here or statement.span
                self.low.problems.error(
                    "E410", error.message, place, "does not fit", help=error.help
                )
                self._poison(statement)

    def _statement(self, statement: ast.Statement) -> None:
        self.here = statement.span
        if self.inside == "repeat" and isinstance(statement, _OF_BLOCKS):
            self.error(
                "E240",
                "a `repeat` holds the equations of one layer only",
                None,
                "not in a `repeat`",
                help="move it behind the loop, or use `for`, which writes every layer out",
            )
        match statement:
            case ast.If():
                chosen = statement.then if self.flag(statement.condition) else statement.otherwise
                self.run(chosen)
            case ast.Collect():
                self.collected.append((statement.name.value, self.one(statement.value)))
            case ast.Alias():
                copy, original = self.path(statement.copy), self.path(statement.original)
                self.low.alias(copy, original, self.builder.graph, statement)
            case ast.Return():
                self.returns = statement
                self.returned = [self.one(v) for v in statement.values]
            case _:
                _STATEMENTS[type(statement)](self, statement)

    def _require(self, statement: ast.Require) -> None:
        numbers = {n: e for n, e in self.env.items() if isinstance(e, Const)}
        # What needs parameters only was checked when the block was bound.
        if not set(ast.names_in(statement.condition)) <= set(self.bound.params):
            counted = replace(statement, condition=self.counts(statement.condition))
            self.low.binder.require(counted, numbers, statement.span)

    def _let(self, statement: ast.Let) -> None:
        value = self.const(statement.value)
        self.env[statement.name.value] = Const(value, statement.span)

    def _poison(self, statement: ast.Statement) -> None:
        for name in _assigned([statement]):
            self.env[name] = POISON
        if isinstance(statement, ast.Let):
            self.env[statement.name.value] = POISON

    def _assign(self, statement: ast.Assign) -> None:
        names = [t.value for t in statement.targets]
        result = self.value(statement.value, names)
        if isinstance(result, Const):
            self.error(
                "E213",
                "this is a number known when the model is built",
                statement.value,
                "not a tensor",
                help=f"write `let {names[0]} = ..`",
            )
        values = self.values(result)
        if len(values) != len(names):
            self.error(
                "E214",
                f"{len(values)} results for {len(names)} names",
                statement.value,
                f"gives {len(values)}",
                help="name each result once",
            )
        for name, value in zip(names, values, strict=True):
            self.env[name] = value

    def _output(self, statement: ast.Output) -> None:
        if self.inside or not self.low.is_root(self.builder.graph):
            self.error(
                "E215",
                "only the outermost block of a model has outputs",
                statement.name,
                "in an inner block",
                help="write `collect`, or return the value",
            )
        if self._collects_nothing(statement.value):
            return
        values = self.values(self.value(statement.value, [statement.name.value]))
        self.outputs += [(statement.name, value) for value in values]

    def _collects_nothing(self, node: ast.Expr) -> bool:
        """An output of what no block collected is none, where a term of a sum would be 0."""
        if not isinstance(node, ast.Call) or node.function.value != "collected":
            return False
        wanted = [a.value.value for a in node.arguments if isinstance(a.value, ast.Name)]
        return len(wanted) == 1 and all(name != wanted[0] for name, _ in self.collected)

    def _for(self, statement: ast.For) -> None:
        index = 0
        groups = self.groups(statement.slot)
        if sum(group.count for group in groups) > MAX_COPIES:
            self.error(
                "E241",
                f"`for` would write its lines out more than {MAX_COPIES} times",
                statement.slot,
                f"{sum(group.count for group in groups)} blocks",
                help="use `repeat`, which stays one loop, or fewer blocks",
            )
        for group in groups:
            for _ in range(group.count):
                index += 1
                self.env[statement.module.value] = group.ref
                self.env[statement.index.value] = Const(index, statement.index.span)
                self.run(statement.body)

    def _repeat(self, statement: ast.Repeat) -> None:
        carried = [n for n in _assigned(statement.body) if isinstance(self.env.get(n), Value)]
        start = 0
        for group in self.groups(statement.slot):
            before = [self.tensor(n) for n in carried]
            region = Region(
                [self.builder.value(n, v.type) for n, v in zip(carried, before, strict=True)]
            )
            env: dict[str, Entry] = {
                **self.env,
                **dict(zip(carried, region.args, strict=True)),
                statement.module.value: group.ref,
                statement.index.value: LayerIndex(),
            }
            inner = Frame(self.low, self.bound, self.builder, self.prefix, env, inside="repeat")
            outer_ops, self.builder.ops = self.builder.ops, region.ops
            try:
                inner.run(statement.body)
                yields = [inner.tensor(n) for n in carried] + [v for _, v in inner.collected]
                region.ops.append(Op("yield", yields, spans=(statement.span,)))
            finally:
                self.builder.ops = outer_ops
            names = [*carried, *(n for n, _ in inner.collected)]
            self.here = statement.slot.span
            results = self.op(
                "repeat", before, regions=[region], names=names, start=start, count=group.count
            )
            self.env.update(zip(carried, results, strict=False))
            self.collected += [
                (name, value)
                for (name, _), value in zip(inner.collected, results[len(carried) :], strict=True)
            ]
            start += group.count


# What belongs to a whole block.
_OF_BLOCKS = ast.Output | ast.Alias | ast.Return | ast.Repeat | ast.For

_STATEMENTS: dict[type, Callable[[Frame, Any], None]] = {
    ast.Require: Frame._require,
    ast.Let: Frame._let,
    ast.Assign: Frame._assign,
    ast.Output: Frame._output,
    ast.For: Frame._for,
    ast.Repeat: Frame._repeat,
}


def _assigned(body: Sequence[ast.Statement]) -> list[str]:
    """Names that statements assign, in order, each once."""
    found: dict[str, None] = {}
    for statement in body:
        match statement:
            case ast.Assign():
                for target in statement.targets:
                    found.setdefault(target.value)
            case ast.If():
                found |= dict.fromkeys(_assigned([*statement.then, *statement.otherwise]))
            case ast.For() | ast.Repeat():
                found |= dict.fromkeys(_assigned(statement.body))
            case _:
                pass
    return list(found)
