"""Masks of attention: conditions over the positions of a query and a key, as text in the graph.

`q - k < 128 or k < 4` lets a query at position q see the keys at positions k that it holds for.
Positions are whole numbers from 0. A mask is read by the parser of the block language, checked,
and written as Python over tensors; nothing evaluates its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from compiler.ops.base import TypeMismatch
from dsl import ast
from dsl.diagnostic import DiagnosticError
from dsl.parse import parse_expression
from dsl.source import Source

QUERY, KEY = "q", "k"
"""What a mask calls the position of the query and that of the key."""

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
LARGEST_POSITION = 2**31
"""Positions are below it, and with them all numbers of a mask fit into 64 bits."""


class MaskError(TypeMismatch):
    """What a mask cannot hold; `node` is the part that it cannot hold."""

    def __init__(self, node: ast.Expr, message: str, help: str = "") -> None:
        super().__init__(message, help=help)
        self.node = node


def parse(text: str) -> ast.Expr:
    """The mask that a text of `written` says. Raises `TypeMismatch`."""
    source = Source("mask", text)
    try:
        node = parse_expression(source, 0, len(text))
    except DiagnosticError as error:
        raise TypeMismatch(f"{text!r} is no mask: {error.diagnostics[0].message}") from None
    need_mask(node)
    return node


def need_mask(node: ast.Expr) -> None:
    """Raises `MaskError` unless a node is a condition over positions that 64 bits can compute."""
    if _kind(node) != "condition":
        raise MaskError(
            node, "a mask is a condition, this is a number", "compare it: `q - k < 128`"
        )


def _kind(node: ast.Expr) -> Literal["condition", "number"]:
    match node:
        case ast.Name():
            if node.value not in (QUERY, KEY):
                raise MaskError(
                    node,
                    f"a mask does not know {node.value}",
                    f"it reads the positions {QUERY} and {KEY}, and numbers",
                )
            return "number"
        case ast.Number(value=int()):
            return "number"
        case ast.Number():
            raise MaskError(node, f"numbers of a mask are whole, this is {node.value:g}")
        case ast.Unary(operator="not"):
            _need(node.operand, "condition", node.operator)
            return "condition"
        case ast.Unary():
            _need(node.operand, "number", node.operator)
            return "number"
        case ast.Binary():
            return _binary(node)
    raise MaskError(
        node,
        f"a mask cannot hold `{node.span.text}`",
        "whole numbers, + - * // %, comparisons, and, or, not",
    )


def _binary(node: ast.Binary) -> Literal["condition", "number"]:
    sides = (node.left, node.right)
    wanted: Literal["condition", "number"] = "number"
    if node.operator in ("and", "or"):
        wanted = "condition"
    for side in sides:
        _need(side, wanted, node.operator)
    if node.operator in COMPARISONS and not ast.names_in(node):
        raise MaskError(node, f"`{node.span.text}` reads no position")
    if node.operator in ("and", "or", *COMPARISONS):
        return "condition"
    if node.operator in ("/", "**"):
        raise MaskError(node, f"`{node.operator}` of positions is no whole number", "use `//`")
    if node.operator in ("//", "%") and not (
        isinstance(node.right, ast.Number) and node.right.value > 0
    ):
        raise MaskError(node, f"`{node.operator}` needs a number above 0 after it")
    if node.operator == "*" and not any(isinstance(side, ast.Number) for side in sides):
        raise MaskError(node, "positions are multiplied by numbers only")
    if _magnitude(node) >= 2**63:
        raise MaskError(node, "numbers of a mask fit into 64 bits, this does not")
    return "number"


def _need(node: ast.Expr, kind: str, operator: str) -> None:
    found = _kind(node)
    if found != kind:
        raise MaskError(node, f"`{operator}` takes a {kind}, this is a {found}")
    if _magnitude(node) >= 2**63:
        raise MaskError(node, "numbers of a mask fit into 64 bits, this does not")


def _magnitude(node: ast.Expr) -> int:
    """What no value of a number exceeds; 0 for conditions."""
    match node:
        case ast.Number():
            return abs(int(node.value))
        case ast.Name():
            return LARGEST_POSITION
        case ast.Unary(operator="-"):
            return _magnitude(node.operand)
        case ast.Binary():
            left, right = _magnitude(node.left), _magnitude(node.right)
            sizes = {"+": left + right, "-": left + right, "*": left * right, "//": left}
            return {**sizes, "%": right}.get(node.operator, 0)
    return 0


# ---- as text -----------------------------------------------------------------------------------

# How tightly operators bind, in the block language and in Python over tensors.
_ADDITIVE = {"+": 5, "-": 5, "*": 6, "//": 6, "%": 6}
_BLOCK = {"or": 1, "and": 2, "not": 3, **dict.fromkeys(COMPARISONS, 4), **_ADDITIVE}
_PYTHON = {**dict.fromkeys(COMPARISONS, 1), "or": 2, "and": 3, **_ADDITIVE, "not": 7}
_NEGATION, _ATOM = 7, 8
_SYMBOLS = {"or": "|", "and": "&", "not": "~"}


def written(node: ast.Expr) -> str:
    """A mask in the block language, with the fewest parentheses."""
    return _written(node, _BLOCK, {})[0]


def as_python(node: ast.Expr) -> str:
    """The same over tensors of positions that are called q and k."""
    return _written(node, _PYTHON, _SYMBOLS)[0]


def _written(node: ast.Expr, levels: dict[str, int], symbols: dict[str, str]) -> tuple[str, int]:
    """The text of a node, and how tightly it binds."""

    def at(part: ast.Expr, least: int) -> str:
        text, level = _written(part, levels, symbols)
        return text if level >= least else f"({text})"

    match node:
        case ast.Unary(operator="-"):
            return f"-{at(node.operand, _ATOM)}", _NEGATION
        case ast.Unary():
            level, symbol = levels[node.operator], symbols.get(node.operator, "not ")
            return f"{symbol}{at(node.operand, level)}", level
        case ast.Binary():
            level, symbol = levels[node.operator], symbols.get(node.operator, node.operator)
            # Comparisons do not chain; all others group from the left.
            left = at(node.left, level + (node.operator in COMPARISONS))
            return f"{left} {symbol} {at(node.right, level + 1)}", level
        case ast.Number():
            return str(node.value), _ATOM if node.value >= 0 else _NEGATION
        case ast.Name():
            return node.value, _ATOM
    raise AssertionError(f"need_mask lets no {type(node).__name__} pass")


# ---- as a function -----------------------------------------------------------------------------

Holds = Callable[[int, int], int]

_OPERATORS: dict[str, Callable[[Holds, Holds], Holds]] = {
    "or": lambda a, b: lambda q, k: a(q, k) or b(q, k),
    "and": lambda a, b: lambda q, k: a(q, k) and b(q, k),
    "<": lambda a, b: lambda q, k: a(q, k) < b(q, k),
    "<=": lambda a, b: lambda q, k: a(q, k) <= b(q, k),
    ">": lambda a, b: lambda q, k: a(q, k) > b(q, k),
    ">=": lambda a, b: lambda q, k: a(q, k) >= b(q, k),
    "==": lambda a, b: lambda q, k: a(q, k) == b(q, k),
    "!=": lambda a, b: lambda q, k: a(q, k) != b(q, k),
    "+": lambda a, b: lambda q, k: a(q, k) + b(q, k),
    "-": lambda a, b: lambda q, k: a(q, k) - b(q, k),
    "*": lambda a, b: lambda q, k: a(q, k) * b(q, k),
    "//": lambda a, b: lambda q, k: a(q, k) // b(q, k),
    "%": lambda a, b: lambda q, k: a(q, k) % b(q, k),
}


def as_function(node: ast.Expr) -> Holds:
    """A mask of positions q and k as numbers."""
    match node:
        case ast.Name():
            return (lambda q, k: q) if node.value == QUERY else (lambda q, k: k)
        case ast.Number():
            value = int(node.value)
            return lambda q, k: value
        case ast.Unary():
            part = as_function(node.operand)
            return (lambda q, k: not part(q, k)) if node.operator == "not" else (
                lambda q, k: -part(q, k)
            )  # fmt: skip
        case ast.Binary():
            return _OPERATORS[node.operator](as_function(node.left), as_function(node.right))
    raise AssertionError(f"need_mask lets no {type(node).__name__} pass")


def blind_query(node: ast.Expr, positions: int) -> int | None:
    """The first of so many positions whose query does not see itself; None where there is none."""
    holds = as_function(node)
    if _always_sees_itself(node):
        return None
    return next((q for q in range(positions) if not holds(q, q)), None)


def _always_sees_itself(node: ast.Expr) -> bool:
    """Whether a mask holds for q = k, decided without trying positions: all windows do."""
    match node:
        case ast.Binary(operator="or"):
            return _always_sees_itself(node.left) or _always_sees_itself(node.right)
        case ast.Binary(operator="and"):
            return _always_sees_itself(node.left) and _always_sees_itself(node.right)
        case ast.Binary() if node.operator in COMPARISONS:
            left, right = _on_diagonal(node.left), _on_diagonal(node.right)
            same = _renamed(node.left) == _renamed(node.right)
            if not same and (left is None or right is None or left[0] != right[0]):
                return False
            return bool(as_function(node)(0, 0))  # the difference is the same for all positions
    return False


def _renamed(node: ast.Expr) -> str:
    """A number for q = k, as text."""
    return re.sub(rf"\b{KEY}\b", QUERY, written(node))


def _on_diagonal(node: ast.Expr) -> tuple[int, int] | None:
    """a and b where a number is a q + b for q = k."""
    match node:
        case ast.Name():
            return 1, 0
        case ast.Number():
            return 0, int(node.value)
        case ast.Unary():
            part = _on_diagonal(node.operand)
            return part and (-part[0], -part[1])
        case ast.Binary(operator="+" | "-"):
            left, right = _on_diagonal(node.left), _on_diagonal(node.right)
            if left is None or right is None:
                return None
            sign = 1 if node.operator == "+" else -1
            return left[0] + sign * right[0], left[1] + sign * right[1]
    return None
