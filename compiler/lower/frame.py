"""Statements of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from compiler.graph.core import Op, Region, Value
from compiler.lower.bind import Const
from compiler.lower.calls import Calls
from compiler.lower.contract import OUTPUTS
from compiler.lower.scope import POISON, Entry, LayerIndex, Stop
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import DiagnosticError, Label

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
                if self.returns is not None:
                    self.error(
                        "E243",
                        "the block has returned already",
                        None,
                        "never reached",
                        help="let one `return` stand last",
                        span=statement.span,
                    )
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
        for name in _targets([statement]):
            self.env[name] = POISON
        self.returns = self.returns or _return_in([statement])

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
        values = self.values(result, statement.value)
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
        if OUTPUTS.get(statement.name.value) and self._collects_nothing(statement.value):
            return
        values = self.values(self.value(statement.value, [statement.name.value]), statement.value)
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
            self.low.problems.error(
                "E241",
                f"`for` would write its lines out more than {MAX_COPIES} times",
                groups[0].ref.span,
                f"{sum(group.count for group in groups)} blocks",
                [Label(statement.slot.span, "written out here")],
                help="take fewer; `repeat` in a block stays one loop",
            )
            raise Stop
        for group in groups:
            for _ in range(group.count):
                index += 1
                self.env[statement.module.value] = group.ref
                self.env[statement.index.value] = Const(index, statement.index.span)
                self.run(statement.body)

    def _repeat(self, statement: ast.Repeat) -> None:
        targets = _targets(statement.body)
        carried = [n for n in targets if isinstance(self.env.get(n), Value)]
        start, sound = 0, True
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
                yields = [self._carried(inner, targets[n], n) for n in carried]
                yields += [v for _, v in inner.collected]
                region.ops.append(Op("yield", yields, spans=(statement.span,)))
            except Stop:
                sound = False
            finally:
                self.builder.ops = outer_ops
            if not sound:
                continue  # only to find what is wrong in the other groups
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
        if not sound:
            raise Stop

    def _carried(self, inner: Frame, target: ast.Name, name: str) -> Value:
        """What one round makes of a tensor, which the next one takes in its place."""
        before, after = self.tensor(name), inner.env[name]
        if isinstance(after, Const):
            self.error(
                "E213",
                f"{name} is a tensor before the repeat",
                target,
                "a number here",
                help="give the number another name",
            )
        value = inner.tensor(name)
        if value.type != before.type:
            self.error(
                "E410",
                f"a round of the repeat takes {name} as {before.type}, and leaves {value.type}",
                target,
                "does not fit the next round",
                help="give the result another name, or bring it back to what it was",
            )
        return value


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


def _return_in(body: Sequence[ast.Statement]) -> ast.Return | None:
    """The first `return` among statements, whichever way their conditions go."""
    for statement in body:
        found = statement if isinstance(statement, ast.Return) else None
        if isinstance(statement, ast.If):
            found = _return_in([*statement.then, *statement.otherwise])
        if found is not None:
            return found
    return None


def _targets(body: Sequence[ast.Statement]) -> dict[str, ast.Name]:
    """Names that statements assign, in order, each with the place where it is assigned last."""
    found: dict[str, ast.Name] = {}
    for statement in body:
        match statement:
            case ast.Assign():
                found.update((target.value, target) for target in statement.targets)
            case ast.Let():
                found[statement.name.value] = statement.name
            case ast.If():
                found.update(_targets([*statement.then, *statement.otherwise]))
            case ast.For() | ast.Repeat():
                found.update(_targets(statement.body))
            case _:
                pass
    return found
