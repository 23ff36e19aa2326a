"""The text of a program back to the program; the grammar is `text.lark`.

What has no `loc` gets the place in the graph text that it was read from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from compiler.graph.core import (
    Attr,
    Boundary,
    CacheType,
    Derivative,
    Graph,
    Op,
    Program,
    Region,
    Step,
    Value,
    Weight,
)
from compiler.graph.text import CORRESPONDING, CROSSING, RESERVED, WEIGHT
from compiler.graph.types import BYTES, Type, parse_type
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics
from dsl.source import Source, Span
from dsl.suggest import nearest

# A tree or a token of Lark; its shape is the grammar's.
Syntax = Any

MAX_NESTING = 60
_PLACE = re.compile(r'("(?:[^"\\]|\\.)*"):([0-9]+):([0-9]+)')
_ESCAPE = re.compile(r'\\(?:u\{((?:10|[0-9a-f])?[0-9a-f]{1,4})\}|(["\\]))')
_READABLE = {
    "SYMBOL": "a @name", "VALUE": "a %value", "TYPE": "a type", "LOC": "a place", "WORD": "a word",
    "NUMBER": "a number", "STRING": "quoted text", "ABOUT": "a comment", "$END": "the end",
}  # fmt: skip


@cache
def grammar(*, strict: bool = False) -> Lark:
    """The parser. `strict` also reports ambiguities of the grammar; a test builds it so."""
    return Lark(
        Path(__file__).with_name("text.lark").read_text(encoding="utf-8"),
        parser="lalr",
        start="program",
        propagate_positions=True,
        maybe_placeholders=True,
        strict=strict,
    )


def parse_program(source: Source) -> Program:
    """The program that a text describes. Whether it makes sense is for the verifier to say.

    Raises `DiagnosticError` (E50x) with the first mistake against the grammar, or with every
    undefined value, unknown type and name given twice.
    """
    try:
        tree = grammar().parse(source.text)
    except UnexpectedInput as error:
        raise DiagnosticError([_syntax_error(error, source)]) from None
    reader = _Reader(source)
    program = reader.program(tree)
    reader.problems.raise_if_any()
    return program


def _syntax_error(error: UnexpectedInput, source: Source) -> Diagnostic:
    at = min(error.pos_in_stream or 0, len(source.text))
    if isinstance(error, UnexpectedToken):
        names = error.accepts or error.expected
        at = len(source.text) if error.token.type == "$END" else at
        end = min(at + len(error.token), len(source.text))
    else:
        assert isinstance(error, UnexpectedCharacters)
        names, end = error.allowed or set(), at + 1
    expected = ", ".join(sorted(_readable(name) for name in names))
    found = source.text[at:end].split("\n")[0]
    message = f"`{found}` cannot stand here" if found else "the text of the graph ends too early"
    place = source.span(at, end)
    return Diagnostic("E501", message, place, "unexpected", help=f"expected {expected}")


def _readable(terminal: str) -> str:
    return _READABLE.get(terminal) or f"`{grammar().get_terminal(terminal).pattern.value}`"


@dataclass(frozen=True, eq=False)
class _File(Source):
    """A file that is known by name only: its offsets hold the line and the column."""

    _WIDTH = 1 << 30

    def at(self, line: int, column: int) -> Span:
        offset = line * self._WIDTH + column
        return Span(self, offset, offset)

    def position(self, offset: int) -> tuple[int, int]:
        return divmod(offset, self._WIDTH)

    def line(self, number: int) -> str:
        return ""


class _Reader:
    """Turns syntax trees into a program, and collects what is wrong with them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems = Diagnostics()
        self.types: dict[str, Type] = {}
        self.files: dict[str, _File] = {}

    def program(self, tree: Syntax) -> Program:
        name, root, links, *graphs = tree.children
        program = Program(name[1:], root[1:])
        for node in links.children if links else ():
            if node.data == "boundary":
                received = self._tuples(node.children[0], CROSSING, str, "as in <sent=(h)>")
                program.boundary = Boundary(**received)
                continue
            of, other, *rest = node.children
            if node.data == "alias":
                self._put(program.aliases, of, other[1:])
            elif node.data == "derivative":
                self._put(program.derivatives, of, self._derivative(other, *rest))
            elif node.data == "count":
                self._put(program.counts, of, other[1:])
            else:
                self._put(program.steps, of, Step(other[1:], rest[0][1:]))
        for node in graphs:
            graph = self._graph(node)
            self._put(program.graphs, node.children[1], graph)
        return program

    def _derivative(self, backward: Token, weights: Token | None, node: Syntax) -> Derivative:
        numbers = self._tuples(node, CORRESPONDING, int, "as in <results=(0, 2)>")
        return Derivative(backward[1:], weights[1:] if weights else "", **numbers)

    def _tuples(
        self, node: Syntax, keys: Sequence[str], item: type, help: str
    ) -> dict[str, tuple[Any, ...]]:
        """Attributes that are tuples, of names or of numbers; no others."""
        found = self._attributes(node, 0)
        for attribute in node.children if node else ():
            key = attribute.children[0]
            value = found[key]
            fits = isinstance(value, tuple) and all(type(one) is item for one in value)
            if key not in keys or not fits:
                self._problem("E507", f"there is no such {key} here", key, help)
                del found[key]
        return found  # type: ignore[return-value]

    def _graph(self, tree: Syntax) -> Graph:
        about, name, arguments, results, loc, declarations, operators = tree.children
        graph = Graph(name[1:], about=_about(about) if about else "")
        graph.span = (self._places(loc) or (self._span(name),))[0]
        scope: dict[str, Value] = {}
        graph.args = self._arguments(arguments, scope)
        for node in declarations.children:
            symbol, type, *rest = node.children
            if node.data == "weight":
                self._put(graph.weights, symbol, self._weight(self._type(type), rest[0]))
            else:
                self._put(graph.caches, symbol, CacheType(self._type(type)))
        graph.ops = self._operators(operators, scope, 0)
        self._results(graph, name, results.children if results else [])
        return graph

    def _results(self, graph: Graph, name: Token, head: Sequence[Token]) -> None:
        graph.result_names = tuple(map(str, head[::2]))
        declared = [self._type(t) for t in head[1::2]]
        returned = [v.type for v in graph.ops[-1].operands] if graph.ops else []
        # An unknown type or value above would be reported a second time here.
        if declared != returned and not self.problems:
            says, gives = (", ".join(map(str, types)) for types in (declared, returned))
            self._problem("E506", f"{name} says it gives ({says}), and returns ({gives})", name)

    def _weight(self, tensor: Type, node: Syntax) -> Weight:
        given = self._attributes(node, 0)
        for attribute in node.children if node else ():
            key = attribute.children[0]
            if key not in WEIGHT or type(given[key]) is not type(WEIGHT[key]):
                self._problem("E507", f"a weight has no such {key}", key, "as in <stack=256>")
                return Weight(tensor)
        return Weight(tensor, **given)  # type: ignore[arg-type]

    def _operators(self, tree: Syntax, scope: dict[str, Value], depth: int) -> list[Op]:
        ops: list[Op] = []
        for node in tree.children:
            names, kind, operands, attributes, regions, types, loc = node.children
            if depth >= MAX_NESTING and regions.children:
                self._problem("E504", "regions are nested too deeply", kind)
                break
            given = operands.children if operands else []
            op = Op(
                str(kind),
                [self._value(t, scope) for t in given if t.type == "VALUE"],
                tuple(t[1:] for t in given if t.type == "SYMBOL"),
                self._attributes(attributes, depth),
                [self._region(region, scope, depth + 1) for region in regions.children],
                spans=self._places(loc) or (self._span(node),),
            )
            targets = names.children if names else []
            found = [self._type(t) for t in types.children] if types else []
            if len(targets) != len(found):
                message = f"{len(targets)} results of {kind} and {len(found)} types"
                self._problem("E503", message, kind, "one type for each result")
            for target, type in zip(targets, found, strict=False):
                op.results.append(Value(target[1:], type))
                scope[target[1:]] = op.results[-1]
            ops.append(op)
        return ops

    def _region(self, tree: Syntax, outer: Mapping[str, Value], depth: int) -> Region:
        arguments, operators = tree.children
        scope = dict(outer)
        return Region(self._arguments(arguments, scope), self._operators(operators, scope, depth))

    def _arguments(self, tree: Syntax, scope: dict[str, Value]) -> list[Value]:
        children = tree.children if tree else []
        pairs = zip(children[::2], children[1::2], strict=True)
        values = [Value(name[1:], self._type(type)) for name, type in pairs]
        scope.update((v.name, v) for v in values)
        return values

    def _value(self, token: Token, scope: Mapping[str, Value]) -> Value:
        value = scope.get(token[1:])
        if value is None:
            near = nearest(token[1:], scope)
            help = f"did you mean %{near}?" if near else "define it above"
            self._problem("E502", f"{token} is not defined here", token, help)
            return Value(token[1:], Type("f32"))
        return value

    def _attributes(self, tree: Syntax, depth: int) -> dict[str, Attr]:
        found: dict[str, Attr] = {}
        for node in tree.children if tree else ():
            key, literal = node.children
            self._put(found, key, self._attribute(literal, depth))
        return found

    def _attribute(self, node: Syntax, depth: int) -> Attr:
        if isinstance(node, Tree):
            return self._tuple(node, depth + 1)
        match node.type:
            case "NUMBER":
                return float(node) if re.search("[.einf]", node, re.IGNORECASE) else int(node)
            case "STRING":
                return _unescaped(node[1:-1])
            case _:
                return RESERVED.get(node, str(node))

    def _tuple(self, tree: Syntax, depth: int) -> Attr:
        items: list[Attr] = []
        if depth > MAX_NESTING:
            self.problems.error("E504", "tuples are nested too deeply", self._span(tree))
            return ()
        for node in tree.children:
            if isinstance(node, Tree) and node.data == "pair":
                items += [self._attribute(part, depth) for part in node.children]
            elif node is not None:
                items.append(self._attribute(node, depth))
        return tuple(items)

    def _type(self, token: Token) -> Type:
        """The type that a text means; equal texts share one."""
        if token not in self.types:
            try:
                self.types[token] = parse_type(token)
            except ValueError as error:
                help = "as in batch, seq-1, heads=8 or slot@expert"
                self._problem("E505", str(error), token, help)
                return Type("f32")
            if self.types[token].dtype not in BYTES:
                help = f"one of {', '.join(BYTES)}"
                message = f"there is no element type {self.types[token].dtype}"
                self._problem("E505", message, token, help)
        return self.types[token]

    def _places(self, token: Token | None) -> tuple[Span, ...]:
        spans = []
        for quoted, line, column in _PLACE.findall(token or ""):
            name = _unescaped(quoted[1:-1])
            file = self.files.setdefault(name, _File(name, ""))
            spans.append(file.at(int(line), int(column)))
        return tuple(spans)

    def _put(self, table: dict[str, Any], token: Token, value: object) -> None:
        name = token.lstrip("@")
        if name in table:
            self._problem("E508", f"{token} is given twice", token, "remove one")
        table[name] = value

    def _problem(self, code: str, message: str, token: Token, help: str = "") -> None:
        self.problems.error(code, message, self._span(token), "here", help=help)

    def _span(self, node: Syntax) -> Span:
        place = node if isinstance(node, Token) else node.meta
        return self.source.span(place.start_pos or 0, place.end_pos or 0)


def _about(token: Token) -> str:
    lines = re.sub(r"\n[ \t]*$", "", token).split("\n")
    lines = [line.lstrip(" \t").rstrip("\r").removeprefix("//") for line in lines]
    return "\n".join(_unescaped(line.removeprefix(" ")) for line in lines)


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)
