"""The `mask` of an attention: numbers of the block are put in, what is left is checked."""

from __future__ import annotations

from dataclasses import replace

from compiler.lower.bind import Const
from compiler.lower.scope import Poison, Scope
from compiler.ops.mask import KEY, QUERY, MaskError, blind_query, need_mask, written
from dsl import ast

HELP = f"as in `mask = {QUERY} - {KEY} < 128 or {KEY} < 4`"


def lower_mask(frame: Scope, node: ast.Expr) -> str | None:
    """The text of a mask; None where it holds for all positions."""
    try:
        found = _folded(frame, node)
        if isinstance(found, ast.Boolean) and found.value:
            return None
        if isinstance(found, ast.Boolean):
            raise MaskError(node, "no query sees a key by this mask", HELP)
        need_mask(found)
    except MaskError as error:
        frame.error("E229", error.message, error.node, "in this mask", help=error.help or HELP)
    blind = blind_query(found, frame.low.description.spec.sequence.max_position_embeddings)
    if blind is not None:
        frame.error(
            "E229",
            f"by this mask the query at position {blind} does not see itself",
            node,
            f"is false for {QUERY} = {KEY} = {blind}",
            help=f"softmax needs a key for each query: add `or {QUERY} == {KEY}`",
        )
    return written(found)


def _folded(frame: Scope, node: ast.Expr) -> ast.Expr:
    """With the value of each part that reads no position in its place."""
    match node:
        case ast.Name():
            known = isinstance(frame.env.get(node.value), Const | Poison)
            return _constant(frame, node) if known and node.value not in (QUERY, KEY) else node
        case ast.Binary():
            sides = _folded(frame, node.left), _folded(frame, node.right)
            if any(isinstance(side, ast.Boolean) for side in sides) and node.operator in (
                "and",
                "or",
            ):
                return _decided(node, *sides)
            folded = replace(node, left=sides[0], right=sides[1])
            if all(isinstance(side, ast.Number | ast.Boolean | ast.Text) for side in sides):
                return _constant(frame, folded)
            return folded
        case ast.Unary():
            part = _folded(frame, node.operand)
            rest = replace(node, operand=part)
            decided = isinstance(part, ast.Number | ast.Boolean)
            return _constant(frame, rest) if decided else rest
        case ast.Conditional():
            return _folded(frame, node.then if frame.flag(node.condition) else node.otherwise)
        case ast.Call() if not {QUERY, KEY} & {*ast.names_in(node)}:
            return _constant(frame, node)
    return node


def _decided(node: ast.Binary, left: ast.Expr, right: ast.Expr) -> ast.Expr:
    """`and` and `or` of which one side is known."""
    known, other = (left, right) if isinstance(left, ast.Boolean) else (right, left)
    assert isinstance(known, ast.Boolean)
    return known if known.value == (node.operator == "or") else other


def _constant(frame: Scope, node: ast.Expr) -> ast.Expr:
    value = frame.const(node)
    if isinstance(value, bool):
        return ast.Boolean(value, node.span)
    return ast.Text(value, node.span) if isinstance(value, str) else ast.Number(value, node.span)
