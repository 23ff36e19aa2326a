"""The value of expressions that are known before anything is built: numbers, flags and text.

Expressions come from specs of unknown origin: sizes are bounded, and Python never evaluates them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NoReturn

from dsl import ast
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics, Label
from dsl.parse import parse_expression
from dsl.source import Source, Span
from dsl.suggest import did_you_mean
from dsl.yaml import Entry, Scalar, kind

Constant = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Value:
    """A constant and the place of the expression that gave it."""

    value: Constant
    span: Span


# Far beyond any count of tokens or operations; results above it are mistakes.
MAX_MAGNITUDE = 10**36

# name -> (function of numbers, fewest arguments, most arguments)
FUNCTIONS: dict[str, tuple[Callable[..., int | float], int, int]] = {
    "min": (lambda *numbers: min(numbers), 1, 16),
    "max": (lambda *numbers: max(numbers), 1, 16),
    "abs": (abs, 1, 1),
    "round": (round, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
    "exp": (math.exp, 1, 1),
}

_ARITHMETIC: dict[str, Callable[[int | float, int | float], int | float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_ORDER: dict[str, Callable[[int | float, int | float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def describe(value: Constant) -> str:
    """A constant in the words of messages: `the number 3`, `the text "MLA"`, `true`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'the text "{value}"' if isinstance(value, str) else f"the number {value}"


def expression(scalar: Scalar) -> ast.Expr:
    """What a value of a spec says: quoted ones are text, plain ones expressions.

    Raises `DiagnosticError`: E317 for an empty value, E2xx where it is no expression.
    """
    if scalar.quoted:
        return ast.Text(scalar.value, scalar.span)
    if not scalar.value:
        help = "write a value after the `:`"
        _fail("E317", "there is no value here", scalar.span, "nothing follows", help)
    span = scalar.span
    try:
        return parse_expression(span.source, span.start, span.end)
    except DiagnosticError as error:
        if scalar.value.count("(") <= scalar.value.count(")"):
            raise
        # `{a: min(1, 2)}` reaches us as `min(1`.
        help = "inside {...} and [...] a comma ends a value: write it on a line of its own"
        raise DiagnosticError(replace(d, help=help) for d in error.diagnostics) from None


def free_names(expr: ast.Expr) -> Iterator[ast.Name]:
    """The names of values that an expression uses, from left to right."""
    match expr:
        case ast.Name():
            yield expr
        case ast.Unary():
            yield from free_names(expr.operand)
        case ast.Binary():
            yield from free_names(expr.left)
            yield from free_names(expr.right)
        case ast.Conditional():
            yield from free_names(expr.then)
            yield from free_names(expr.condition)
            yield from free_names(expr.otherwise)
        case ast.Call():
            for argument in expr.arguments:
                yield from free_names(argument.value)


def evaluate(expr: ast.Expr, names: Mapping[str, Constant]) -> Constant:
    """The value of `expr`; `and`, `or` and `if` look only at the side they need.

    Raises `DiagnosticError`: E310 for every unknown name, else the first of E312 to E316.
    """
    try:
        unknown = [_unknown(name, names) for name in free_names(expr) if name.value not in names]
        if unknown:
            raise DiagnosticError(unknown)
        return _value(expr, names)
    except RecursionError:
        _fail("E314", "this expression is nested too deeply", expr.span, "", "split it up")


def evaluate_params(entries: Mapping[str, Entry], problems: Diagnostics) -> dict[str, Value]:
    """The parameters of a spec, which may use each other in any order, in the order given.

    Text that has a value without its quotes is refused.
    Adds to `problems` (E302, E311 for cycles, and those of `expression` and `evaluate`). A
    parameter that cannot be evaluated, or that uses such a one, is left out.
    """
    parsed: dict[str, ast.Expr] = {}
    for name, entry in entries.items():
        if not isinstance(entry.node, Scalar):
            message = f"the parameter `{name}` is {kind(entry.node)}"
            label = "expected a number, true, false or quoted text"
            help = "parameters are flat: give each number a name of its own"
            problems.error("E302", message, entry.node.span, label, help=help)
            continue
        try:
            if _is_quoted_expression(entry.node, entries):
                message = f"the parameter `{name}` is {describe(entry.node.value)}"
                label, help = "quoted, so it is text", "remove the quotes"
                problems.error("E302", message, entry.node.span, label, help=help)
            else:
                parsed[name] = expression(entry.node)
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
    names = {name: list(free_names(expr)) for name, expr in parsed.items()}
    for used in names.values():
        problems.extend(_unknown(n, entries) for n in used if n.value not in entries)
    values: dict[str, Constant] = {}
    for name in _dependency_order(parsed, entries, problems):
        if all(n.value in values for n in names[name]):
            try:
                values[name] = evaluate(parsed[name], values)
            except DiagnosticError as error:
                problems.extend(error.diagnostics)
    return {name: Value(values[name], parsed[name].span) for name in entries if name in values}


def _is_quoted_expression(scalar: Scalar, names: Collection[str]) -> bool:
    """Whether text has a value without its quotes: "192", "true", "hidden_size * 4".

    Used as what it looks like, it would fail where it is used, far from the quotes. A single word
    is text, and so is what has words that are no parameters: "top2_sum", "pre-norm".
    """
    if not scalar.quoted:
        return False
    text = Source("", scalar.value)
    try:
        expr = parse_expression(text, 0, len(text.text))
    except DiagnosticError:
        return False
    is_word = isinstance(expr, ast.Name | ast.Text | ast.Path)
    return not is_word and all(name.value in names for name in free_names(expr))


def _dependency_order(
    parsed: Mapping[str, ast.Expr], entries: Mapping[str, Entry], problems: Diagnostics
) -> list[str]:
    """Names so that each follows those it uses; members of cycles are reported and left out."""
    graph = {
        name: [used.value for used in free_names(expr) if used.value in parsed]
        for name, expr in parsed.items()
    }
    while True:
        try:
            return [name for name in TopologicalSorter(graph).static_order() if name in graph]
        except CycleError as error:
            # Each is used by the next; read backwards, "->" means "uses".
            members = list(reversed(error.args[1][1:]))
            first = min(members, key=lambda name: entries[name].key_span.start)
            at = members.index(first)
            path = [*members[at:], *members[:at], first]
            message = f"these parameters need each other: {' -> '.join(path)}"
            label, *others = [Label(parsed[n].span, f"`{n}` uses `{m}`") for n, m in pairwise(path)]
            help = "give one of them a number"
            problems.error("E311", message, label.span, label.text, others, help)
            for name in members:
                del graph[name]


def _fail(code: str, message: str, span: Span, label: str = "", help: str = "") -> NoReturn:
    raise DiagnosticError([Diagnostic(code, message, span, label, help=help)])


def _unknown(name: ast.Name, names: Mapping[str, object]) -> Diagnostic:
    help = did_you_mean(name.value, [*names, "true", "false"])
    label, help = "no parameter is called so", help or "put text between quotes"
    return Diagnostic("E310", f"unknown name `{name.value}`", name.span, label, help=help)


def _value(expr: ast.Expr, names: Mapping[str, Constant]) -> Constant:
    match expr:
        case ast.Number() | ast.Text() | ast.Boolean():
            return expr.value
        case ast.Name():
            return names[expr.value]
        case ast.Unary():
            return _unary(expr, names)
        case ast.Binary():
            return _binary(expr, names)
        case ast.Conditional():
            chosen = expr.then if _flag(expr.condition, names) else expr.otherwise
            return _value(chosen, names)
        case ast.Call():
            return _call(expr, names)
        case ast.Path():
            _fail("E316", "a path of weights has no value", expr.span, "expected a number")


def _number(expr: ast.Expr, names: Mapping[str, Constant], user: str) -> int | float:
    value = _value(expr, names)
    if isinstance(value, bool | str):
        found = describe(value)
        _fail("E313", f"{user} needs numbers, not {found}", expr.span, f"this is {found}")
    return value


def _flag(expr: ast.Expr, names: Mapping[str, Constant]) -> bool:
    value = _value(expr, names)
    if not isinstance(value, bool):
        found, help = describe(value), "compare it, for example with `!= 0`"
        message = f"a condition is true or false, not {found}"
        _fail("E313", message, expr.span, f"this is {found}", help)
    return value


def _unary(expr: ast.Unary, names: Mapping[str, Constant]) -> Constant:
    if expr.operator == "not":
        return not _flag(expr.operand, names)
    return -_number(expr.operand, names, "`-`")


def _binary(expr: ast.Binary, names: Mapping[str, Constant]) -> Constant:
    if expr.operator == "and":
        return _flag(expr.left, names) and _flag(expr.right, names)
    if expr.operator == "or":
        return _flag(expr.left, names) or _flag(expr.right, names)
    if expr.operator in ("==", "!="):
        return _equal(expr, names) == (expr.operator == "==")
    left = _number(expr.left, names, f"`{expr.operator}`")
    right = _number(expr.right, names, f"`{expr.operator}`")
    if expr.operator in _ORDER:
        return _ORDER[expr.operator](left, right)
    if expr.operator == "**" and abs(left) > 1 and right * math.log10(abs(left)) > 36:
        _fail_size(expr.span)
    return _bounded(expr.operator, _ARITHMETIC[expr.operator], (left, right), expr.span)


def _equal(expr: ast.Binary, names: Mapping[str, Constant]) -> bool:
    left, right = _value(expr.left, names), _value(expr.right, names)
    # Python's `1 == True` would hide a mistake.
    kinds = [type(v) if isinstance(v, bool | str) else float for v in (left, right)]
    if kinds[0] is not kinds[1]:
        message = f"{describe(left)} is never equal to {describe(right)}"
        _fail("E313", message, expr.span, "these are of different kinds")
    return left == right


def _call(expr: ast.Call, names: Mapping[str, Constant]) -> Constant:
    name = expr.function.value
    if name not in FUNCTIONS:
        help = did_you_mean(name, FUNCTIONS) or f"the functions are {', '.join(FUNCTIONS)}"
        label = "not a function of numbers"
        _fail("E315", f"unknown function `{name}`", expr.function.span, label, help)
    function, fewest, most = FUNCTIONS[name]
    for argument in expr.arguments:
        if argument.name is not None:
            message = f"`{name}` takes its arguments without names"
            _fail("E315", message, argument.name.span, "remove this name")
    if not fewest <= len(expr.arguments) <= most:
        wanted = "one argument" if most == 1 else f"{fewest} to {most} arguments"
        _fail("E315", f"`{name}` takes {wanted}, not {len(expr.arguments)}", expr.span, "here")
    numbers = tuple(_number(a.value, names, f"`{name}`") for a in expr.arguments)
    return _bounded(name, function, numbers, expr.span)


def _bounded(
    name: str,
    function: Callable[..., int | float | complex],
    numbers: tuple[int | float, ...],
    span: Span,
) -> int | float:
    try:
        result = function(*numbers)
    except ZeroDivisionError:
        _fail("E312", "division by zero", span, f"{numbers[0]} is divided by 0")
    except OverflowError:
        _fail_size(span)
    except ValueError:
        _fail("E312", f"`{name}` is not defined for {numbers[0]}", span, "has no value")
    if isinstance(result, complex):
        _fail("E312", f"{numbers[0]} has no real power {numbers[1]}", span, "has no value")
    if not abs(result) <= MAX_MAGNITUDE:
        _fail_size(span)
    return result


def _fail_size(span: Span) -> NoReturn:
    help = "no size of a model comes near; is a unit or a power wrong?"
    _fail("E314", "the result is larger than 10**36", span, "too large", help)
