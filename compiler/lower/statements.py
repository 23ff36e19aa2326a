"""What each statement of a block means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from compiler.graph.core import Op, Region, Value
from compiler.lower.bind import Const
from compiler.lower.contract import OUTPUTS
from compiler.lower.expressions import Expressions
from compiler.lower.scope import POISON, Entry, LayerIndex
from compiler.lower.state import Stop
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import DiagnosticError, Label

MAX_COPIES = 1_000  # of the lines of a `for`

# What belongs to a whole block.
_OF_BLOCKS = ast.Output | ast.Alias | ast.Return | ast.Repeat | ast.For


def run(frame: Expressions, body: Sequence[ast.Statement]) -> None:
    """Lowers statements in order; a mistake in one does not hide those in others."""
    for statement in body:
        try:
            _statement(frame, statement)
        except Stop:
            _poison(frame, statement)
        except DiagnosticError as error:
            frame.low.problems.extend(error.diagnostics)
            _poison(frame, statement)
        except TypeMismatch as error:
            place = frame.here or statement.span
            frame.low.problems.error("E410", error.message, place, "does not fit", help=error.help)
            _poison(frame, statement)


def _statement(frame: Expressions, statement: ast.Statement) -> None:
    frame.here = statement.span
    if frame.inside == "repeat" and isinstance(statement, _OF_BLOCKS):
        frame.error(
            "E240",
            "a `repeat` holds the equations of one layer only",
            None,
            "not in a `repeat`",
            help="move it after the loop, or use `for`, which writes every layer out",
        )
    _STATEMENTS[type(statement)](frame, statement)


def _if(frame: Expressions, statement: ast.If) -> None:
    run(frame, statement.then if frame.flag(statement.condition) else statement.otherwise)


def _let(frame: Expressions, statement: ast.Let) -> None:
    frame.env[statement.name.value] = Const(frame.const(statement.value), statement.span)


def _collect(frame: Expressions, statement: ast.Collect) -> None:
    frame.collected.append((statement.name.value, frame.one(statement.value)))


def _require(frame: Expressions, statement: ast.Require) -> None:
    numbers = {n: e for n, e in frame.env.items() if isinstance(e, Const)}
    # What needs parameters only was checked when the block was bound.
    if not set(ast.names_in(statement.condition)) <= set(frame.bound.params):
        counted = replace(statement, condition=frame.counts(statement.condition))
        frame.low.binder.require(counted, numbers, statement.span)


def _assign(frame: Expressions, statement: ast.Assign) -> None:
    names = [t.value for t in statement.targets]
    result = frame.value(statement.value, names)
    if isinstance(result, Const):
        frame.error(
            "E213",
            "this is a number known when the model is built",
            statement.value,
            "not a tensor",
            help=f"write `let {names[0]} = ..`",
        )
    values = frame.values(result, statement.value)
    if len(values) != len(names):
        frame.error(
            "E214",
            f"{len(values)} results for {len(names)} names",
            statement.value,
            f"gives {len(values)}",
            help="name each result once",
        )
    for name, value in zip(names, values, strict=True):
        frame.env[name] = value


def _output(frame: Expressions, statement: ast.Output) -> None:
    if frame.inside or not frame.is_root:
        frame.error(
            "E215",
            "only the outermost block of a model has outputs",
            statement.name,
            "in an inner block",
            help="write `collect`, or return the value",
        )
    if OUTPUTS.get(statement.name.value) and _collects_nothing(frame, statement.value):
        return
    values = frame.values(frame.value(statement.value, [statement.name.value]), statement.value)
    frame.outputs += [(statement.name, value) for value in values]


def _collects_nothing(frame: Expressions, node: ast.Expr) -> bool:
    """An output of what no block collected is none, where a term of a sum would be 0."""
    if not isinstance(node, ast.Call) or node.function.value != "collected":
        return False
    wanted = [a.value.value for a in node.arguments if isinstance(a.value, ast.Name)]
    return len(wanted) == 1 and all(name != wanted[0] for name, _ in frame.collected)


def _alias(frame: Expressions, statement: ast.Alias) -> None:
    """Records that checkpoints hold a weight of the outermost block a second time."""
    copy, original = frame.path(statement.copy), frame.path(statement.original)
    low, weights = frame.low, frame.builder.graph.weights
    if not frame.is_root or original not in weights:
        if low.problems and frame.is_root:
            return  # the weight may only be missing because its equation could not be made
        frame.error(
            "E232",
            f"{original} is no weight of the outermost block",
            statement.original,
            "not found",
            help="alias weights of the outermost block, after their first use",
        )
    if copy in weights or low.program.aliases.setdefault(copy, original) != original:
        frame.error(
            "E232",
            f"{copy} is a tensor of its own already, and cannot be a copy of {original}",
            statement.copy,
            "taken",
            help="give the copy another name",
        )


def _for(frame: Expressions, statement: ast.For) -> None:
    index = 0
    groups = frame.groups(statement.slot)
    if sum(group.count for group in groups) > MAX_COPIES:
        frame.low.problems.error(
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
            frame.env[statement.module.value] = group.ref
            frame.env[statement.index.value] = Const(index, statement.index.span)
            run(frame, statement.body)


def _repeat(frame: Expressions, statement: ast.Repeat) -> None:
    targets = _targets(statement.body)
    carried = [n for n in targets if isinstance(frame.env.get(n), Value)]
    start, sound = 0, True
    for group in frame.groups(statement.slot):
        before = [frame.tensor(n) for n in carried]
        region = Region(
            [frame.builder.value(n, v.type) for n, v in zip(carried, before, strict=True)]
        )
        env: dict[str, Entry] = {
            **frame.env,
            **dict(zip(carried, region.args, strict=True)),
            statement.module.value: group.ref,
            statement.index.value: LayerIndex(),
        }
        inner = type(frame)(
            frame.low, frame.bound, frame.builder, frame.prefix, env, inside="repeat"
        )
        try:
            with frame.builder.into(region.ops):
                run(inner, statement.body)
                yields = [_carried(frame, inner, targets[n], n) for n in carried]
                yields += [v for _, v in inner.collected]
                region.ops.append(Op("yield", yields, spans=(statement.span,)))
        except Stop:
            sound = False
        if not sound:
            continue  # only to find what is wrong in the other groups
        names = [*carried, *(n for n, _ in inner.collected)]
        frame.here = statement.slot.span
        results = frame.op(
            "repeat", before, regions=[region], names=names, start=start, count=group.count
        )
        frame.env.update(zip(carried, results, strict=False))
        frame.collected += [
            (name, value)
            for (name, _), value in zip(inner.collected, results[len(carried) :], strict=True)
        ]
        start += group.count
    if not sound:
        raise Stop


def _carried(frame: Expressions, inner: Expressions, target: ast.Name, name: str) -> Value:
    """What one round makes of a tensor, which the next one takes in its place."""
    before, after = frame.tensor(name), inner.env[name]
    if isinstance(after, Const):
        frame.error(
            "E213",
            f"{name} is a tensor before the repeat",
            target,
            "a number here",
            help="give the number another name",
        )
    value = inner.tensor(name)
    if value.type != before.type:
        frame.error(
            "E410",
            f"a round of the repeat takes {name} as {before.type}, and leaves {value.type}",
            target,
            "does not fit the next round",
            help="give the result another name, or bring it back to what it was",
        )
    return value


def _return(frame: Expressions, statement: ast.Return) -> None:
    if frame.returns is not None:
        frame.error(
            "E243",
            "the block has returned already",
            None,
            "never reached",
            help="let one `return` stand last",
            span=statement.span,
        )
    frame.returns = statement
    frame.returned = [frame.one(v) for v in statement.values]


_STATEMENTS: dict[type, Callable[[Expressions, Any], None]] = {
    ast.If: _if,
    ast.Let: _let,
    ast.Require: _require,
    ast.Assign: _assign,
    ast.Collect: _collect,
    ast.Output: _output,
    ast.Alias: _alias,
    ast.For: _for,
    ast.Repeat: _repeat,
    ast.Return: _return,
}


def _poison(frame: Expressions, statement: ast.Statement) -> None:
    for name in _targets([statement]):
        frame.env[name] = POISON
    frame.returns = frame.returns or _return_in([statement])


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
