"""Text of the block language and of expressions to syntax trees. Lark does not show through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lark import Token, Tree
from lark.exceptions import LarkError
from lark.tree import Meta

from dsl import ast
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics
from dsl.grammar import grammar
from dsl.source import Source, Span
from dsl.syntax import KEYWORDS, syntax_error
from dsl.units import parse_quantity

# Deep nesting is refused before a recursive walk over the tree could exhaust Python's stack.
MAX_NESTING = 60
MAX_EXPRESSION = 2_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # `NAME` of the grammar


def parse_expression(source: Source, start: int, end: int) -> ast.Expr:
    """The expression between two offsets; spans are those of `source`.

    Raises `DiagnosticError` (E2xx) where it is none.
    """
    if end - start > MAX_EXPRESSION:
        _fail("E204", "this expression is too long", source.span(start, end), "", "split it up")
    atom = _atom(source.span(start, end))
    if atom is not None:
        return atom
    result = _parse(source, start, end, "expression_only")
    assert isinstance(result, ast.Expr)
    return result


def _atom(span: Span) -> ast.Number | ast.Name | None:
    """A number or a name by itself, as most values of a spec are: it needs no parser."""
    text = span.text
    if _NAME.fullmatch(text):
        return ast.Name(text, span) if text not in KEYWORDS else None
    if text[:1].isdigit():
        with suppress(ValueError):  # no number by itself, or a wrong one, which the parser reports
            return ast.Number(parse_quantity(text), span)
    return None


def parse_blocks(source: Source) -> tuple[ast.Block, ...]:
    """All blocks of a file. A mistake in one does not hide those in the others.

    Raises `DiagnosticError` (E2xx) with every mistake found.
    """
    problems = Diagnostics()
    blocks: list[ast.Block] = []
    for start, end, rule in _chunks(source, problems):
        try:
            block = _parse(source, start, end, rule)
            assert isinstance(block, ast.Block)
            blocks.append(block)
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
    if not blocks and not problems:
        problems.error(
            "E201",
            "this file holds no block",
            source.span(0, 0),
            "",
            help="begin with `block NAME(x: [batch, seq, hidden_size]) -> ...:`",
        )
    problems.raise_if_any()
    return tuple(blocks)


def _chunks(source: Source, problems: Diagnostics) -> Iterator[tuple[int, int, str]]:
    """One range a block or extern, cut where a line begins with a word."""
    text = source.text
    starts = [match.start() for match in re.finditer(r"^(?=[^\s#])", text, re.MULTILINE)]
    starts = [s for s in starts if not text.startswith((")", "]", "}"), s)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        begins = re.compile(r"(block|extern)\b").match(text, start)
        if begins is not None:
            yield start, end, begins[1]
        else:
            word = re.compile(r"\S+").match(text, start)
            assert word is not None
            problems.error(
                "E201",
                "only blocks may start at the left margin of a block file",
                source.span(start, word.end()),
                "this is not `block`",
                help="indent the line if it belongs to the block above, or make it a # comment",
            )


def _parse(source: Source, start: int, end: int, rule: str) -> Any:
    text = source.text[start:end]
    depth = longest = 0
    for bracket in re.findall(r"[][(){}]", text):
        depth += 1 if bracket in "([{" else -1
        longest = max(longest, depth)
    if longest > MAX_NESTING:
        _fail("E204", "brackets are nested too deeply", source.span(start, end), "", "split it up")
    if rule != "expression_only" and not text.endswith("\n"):
        text += "\n"
    try:
        tree = grammar().parse(text, start=rule)
        return _Build(source, start).made_of(tree)
    except RecursionError:
        _fail("E204", "this is nested too deeply", source.span(start, end), "", "split it up")
    except LarkError as error:
        raise DiagnosticError([syntax_error(error, source, start, end)]) from None


def _fail(code: str, message: str, span: Span, label: str, help: str) -> Any:
    raise DiagnosticError([Diagnostic(code, message, span, label, help=help)])


def _arguments(items: Any) -> tuple[ast.Argument, ...]:
    return tuple(i for i in (items or ()) if isinstance(i, ast.Argument))


class _Build:
    """Lark's trees to ours. One method a grammar rule; spans become those of the whole file."""

    def __init__(self, source: Source, offset: int) -> None:
        self.source = source
        self.offset = offset

    def made_of(self, tree: Tree[Token]) -> Any:
        """What the method of a tree's rule makes of it."""
        items = [self.made_of(i) if isinstance(i, Tree) else i for i in tree.children]
        return getattr(self, tree.data)(tree.meta, items)

    def span(self, meta: Meta) -> Span:
        if meta.empty:
            return self.source.span(self.offset, self.offset)
        end = min(self.offset + meta.end_pos, len(self.source.text))
        return self.source.span(self.offset + meta.start_pos, end)

    def token_span(self, token: Token) -> Span:
        start = self.offset + (token.start_pos or 0)
        return self.source.span(start, start + len(token))

    def name(self, token: Token) -> ast.Name:
        return ast.Name(str(token), self.token_span(token))

    def quoted(self, token: Token) -> ast.Text:
        return ast.Text(str(token)[1:-1], self.token_span(token))

    # expressions

    def expression_only(self, meta: Meta, items: list[Any]) -> ast.Expr:
        return items[0]  # type: ignore[no-any-return]

    def parenthesis(self, meta: Meta, items: list[Any]) -> ast.Expr:
        return items[0]  # type: ignore[no-any-return]

    def number(self, meta: Meta, items: list[Token]) -> ast.Number:
        span = self.token_span(items[0])
        try:
            return ast.Number(parse_quantity(str(items[0])), span)
        except ValueError as error:
            raise DiagnosticError([Diagnostic("E205", str(error), span, "this number")]) from None

    def text(self, meta: Meta, items: list[Token]) -> ast.Text:
        return self.quoted(items[0])

    def boolean(self, meta: Meta, items: list[Token]) -> ast.Boolean:
        return ast.Boolean(str(items[0]) == "true", self.token_span(items[0]))

    def unary(self, meta: Meta, items: list[Any]) -> ast.Unary:
        return ast.Unary(str(items[0]), items[1], self.span(meta))

    def binary(self, meta: Meta, items: list[Any]) -> ast.Binary:
        left, operator, right = items
        span = self.span(meta)
        return ast.Binary(str(operator), left, right, span, self.token_span(operator))

    def conditional(self, meta: Meta, items: list[Any]) -> ast.Conditional:
        then, condition, otherwise = items
        return ast.Conditional(condition, then, otherwise, self.span(meta))

    def call(self, meta: Meta, items: list[Any]) -> ast.Call:
        return ast.Call(self.name(items[0]), items[1] or (), self.span(meta))

    def arguments(self, meta: Meta, items: list[Any]) -> tuple[ast.Argument, ...]:
        return _arguments(items)

    def argument(self, meta: Meta, items: list[Any]) -> ast.Argument:
        name, value = items
        return ast.Argument(self.name(name) if name else None, value, self.span(meta))

    def path(self, meta: Meta, items: list[Any]) -> ast.Path | ast.Name:
        if len(items) == 1:
            return self.name(items[0])
        return ast.Path(((str(items[0]),), *items[1:]), self.span(meta))

    def path_name(self, meta: Meta, items: list[Token]) -> tuple[str]:
        return (str(items[0]),)

    def path_expression(self, meta: Meta, items: list[Any]) -> tuple[ast.Expr]:
        return (items[0],)

    # statements

    def suite(self, meta: Meta, items: list[Any]) -> tuple[ast.Statement, ...]:
        return tuple(items)

    def require(self, meta: Meta, items: list[Any]) -> ast.Require:
        condition, message, help = items
        return ast.Require(
            condition, self.quoted(message), self.quoted(help) if help else None, self.span(meta)
        )

    def let(self, meta: Meta, items: list[Any]) -> ast.Let:
        return ast.Let(self.name(items[0]), items[1], self.span(meta))

    def assign(self, meta: Meta, items: list[Any]) -> ast.Assign:
        return ast.Assign(tuple(self.name(t) for t in items[:-1]), items[-1], self.span(meta))

    def collect(self, meta: Meta, items: list[Any]) -> ast.Collect:
        return ast.Collect(self.name(items[0]), items[1], self.span(meta))

    def output(self, meta: Meta, items: list[Any]) -> ast.Output:
        return ast.Output(self.name(items[0]), items[1], self.span(meta))

    def alias(self, meta: Meta, items: list[Any]) -> ast.Alias:
        return ast.Alias(_as_path(items[0]), _as_path(items[1]), self.span(meta))

    def return_statement(self, meta: Meta, items: list[Any]) -> ast.Return:
        return ast.Return(tuple(items), self.span(meta))

    def for_statement(self, meta: Meta, items: list[Any]) -> ast.For:
        module, index, slot, body = items
        return ast.For(self.name(module), self.name(index), self.name(slot), body, self.span(meta))

    def repeat_statement(self, meta: Meta, items: list[Any]) -> ast.Repeat:
        module, index, slot, body = items
        return ast.Repeat(
            self.name(module), self.name(index), self.name(slot), body, self.span(meta)
        )

    def if_statement(self, meta: Meta, items: list[Any]) -> ast.If:
        *branches, otherwise = items
        result: tuple[ast.Statement, ...] = otherwise or ()
        # `elif` is an `if` inside `else`.
        for condition, then in reversed(list(zip(branches[::2], branches[1::2], strict=True))):
            result = (ast.If(condition, then, result, self.span(meta)),)
        nested = result[0]
        assert isinstance(nested, ast.If)
        return nested

    # blocks

    def about(self, meta: Meta, items: list[Token]) -> str:
        return "\n".join(line.strip() for line in str(items[0])[3:-3].strip().splitlines())

    def tensor_type(self, meta: Meta, items: list[Any]) -> ast.TensorType:
        dtype, *dims = items
        names = tuple(self.name(d) for d in dims if d is not None)
        return ast.TensorType(str(dtype) if dtype else None, names, self.span(meta))

    def value(self, meta: Meta, items: list[Any]) -> ast.Value:
        return ast.Value(self.name(items[0]), items[1], self.span(meta))

    def values(self, meta: Meta, items: list[Any]) -> tuple[ast.Value, ...]:
        return tuple(items)

    def result(self, meta: Meta, items: list[Any]) -> tuple[Any, ...]:
        return tuple(items)

    def param(self, meta: Meta, items: list[Any]) -> ast.Param:
        return ast.Param(self.name(items[0]), items[1], self.span(meta))

    def params(self, meta: Meta, items: list[Any]) -> tuple[ast.Param, ...]:
        return tuple(items)

    def slot(self, meta: Meta, items: list[Any]) -> ast.Slot:
        return ast.Slot(self.name(items[0]), items[1], self.span(meta))

    def slots(self, meta: Meta, items: list[Any]) -> tuple[ast.Slot, ...]:
        return tuple(items)

    def setting(self, meta: Meta, items: list[Any]) -> ast.Setting:
        return ast.Setting(self.name(items[0]), items[1], self.span(meta))

    def extern(self, meta: Meta, items: list[Any]) -> ast.Block:
        name, arguments, results, about, *rest = items
        return ast.Block(
            name=self.name(name),
            about=about or "",
            arguments=arguments,
            results=results,
            params=tuple(p for line in rest if isinstance(line, tuple) for p in line),
            slots=(),
            body=(),
            span=self.span(meta),
            settings=tuple(line for line in rest if isinstance(line, ast.Setting)),
        )

    def block(self, meta: Meta, items: list[Any]) -> ast.Block:
        name, arguments, results, about, *rest = items
        headers = [item for group in rest if isinstance(group, tuple) for item in group]
        return ast.Block(
            name=self.name(name),
            about=about or "",
            arguments=arguments or (),
            results=results or (),
            params=tuple(h for h in headers if isinstance(h, ast.Param)),
            slots=tuple(h for h in headers if isinstance(h, ast.Slot)),
            body=tuple(item for item in rest if not isinstance(item, tuple)),
            span=self.span(meta),
        )


def _as_path(node: ast.Path | ast.Name) -> ast.Path:
    return ast.Path(((node.value,),), node.span) if isinstance(node, ast.Name) else node
