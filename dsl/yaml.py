"""YAML to a tree of text with exact spans. Numbers, names and flags are read later, by type.

Only YAML's plain part is taken: mappings, sequences and scalars. Anchors, aliases, merge keys and
tags are refused, because `extends` and `set` do their work and messages can point at those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics, Label
from dsl.source import Source, Span

MAX_DEPTH = 50
# The pure Python reader takes about a second for this; a spec is a thousandth of it.
MAX_CHARACTERS = 256 * 1024

_CONTROL = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARK = re.compile(r"[&*!][^\s,\[\]{}]*")
_COLON = re.compile(r"\s*:")
_OWN_MECHANISM = "write the value out, or make a variant with `extends` and `set`"


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text. `quoted` is true for every style but the plain one; `value` has escapes resolved."""

    value: str
    quoted: bool
    span: Span

    @property
    def content(self) -> Span | None:
        """The span of `value` without quotes; None where escapes or folds make it differ."""
        for trim in (0, 1):
            span = Span(self.span.source, self.span.start + trim, self.span.end - trim)
            if span.text == self.value:
                return span
        return None


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Entry:
    key_span: Span
    node: Node


@dataclass(frozen=True, slots=True)
class Mapping:
    span: Span
    entries: dict[str, Entry] = field(default_factory=dict)


Node = Scalar | Sequence | Mapping


def kind(node: Node) -> str:
    """What a node is, in the words of messages."""
    if isinstance(node, Mapping):
        return "a mapping"
    return "a list" if isinstance(node, Sequence) else "a single value"


def is_null(node: object) -> bool:
    """Whether a value is `null`, which leaves its key out."""
    return isinstance(node, Scalar) and node.value == "null" and not node.quoted


def nearest_node(root: Node, path: Iterable[str | int]) -> Node:
    """The node at `path`, or the last one on the way where the tree ends before it."""
    node = root
    for part in path:
        child = child_of(node, part)
        if child is None:
            break
        node = child
    return node


def child_of(node: Node, part: str | int) -> Node | None:
    """The value of a key of a mapping, or an item of a list by its index."""
    if isinstance(node, Mapping) and part in node.entries:
        return node.entries[str(part)].node
    if isinstance(node, Sequence) and isinstance(part, int) and 0 <= part < len(node.items):
        return node.items[part]
    return None


def key_span(root: Node, path: tuple[str | int, ...]) -> Span | None:
    """The place of the key that ends `path`; None where there is none."""
    parent = nearest_node(root, path[:-1])
    if isinstance(parent, Mapping) and path[-1] in parent.entries:
        return parent.entries[str(path[-1])].key_span
    return None


def parse_yaml(source: Source, start: int = 0) -> Node:
    """The one document of `source`, read from the offset `start` on.

    Raises `DiagnosticError` (E102 to E111) with every problem that can be found.
    """
    problems = Diagnostics()
    if len(source.text) > MAX_CHARACTERS:
        problems.error(
            "E102",
            f"{source.name} is larger than {MAX_CHARACTERS} characters",
            help="a spec describes one model; split variants into files of their own",
        )
        problems.raise_if_any()
    for match in _CONTROL.finditer(source.text, start):
        message = f"the control character U+{ord(match[0]):04X} is not allowed in YAML"
        problems.error("E109", message, source.span(*match.span()), "remove it")
    problems.raise_if_any()
    node = _Reader(source, start, problems).document()
    problems.raise_if_any()
    return node


class _Reader:
    """Builds nodes from the events of one document."""

    def __init__(self, source: Source, start: int, problems: Diagnostics) -> None:
        self.source = source
        self.problems = problems
        self.position = start
        # Blanks instead of a cut keep every offset that of the source.
        self.events = self._checked(" " * start + source.text[start:])

    def _checked(self, text: str) -> Iterator[Event]:
        """The events of `text`; a syntax error ends them with a diagnostic."""
        try:
            for event in YAML(typ="safe", pure=True).parse(text):
                self.position = self._span(event).end
                yield event
        except MarkedYAMLError as error:
            self._syntax_error(error)
        except (YAMLError, ValueError, OverflowError) as error:
            # A few bad escapes and version numbers surface as Python's own errors, without place.
            at = self.source.span(self.position, self.position)
            self.problems.error("E103", f"this is not YAML: {error}", at, "after this")
        self.problems.raise_if_any()

    def document(self) -> Node:
        node: Node | None = None
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                self._check_document(event, first=node is None)
            elif isinstance(event, StreamEndEvent):
                break
            elif node is None and not isinstance(event, StreamStartEvent):
                node = self._node(event, 0)
        if node is None or (isinstance(node, Scalar) and not node.value and not node.quoted):
            help = "a spec begins with `model: NAME`, a study with `study: NAME`"
            message = f"{self.source.name} is empty"
            self._fatal(Diagnostic("E111", message, self.source.span(0, 0), help=help))
        return node

    def _fatal(self, diagnostic: Diagnostic) -> NoReturn:
        """Ends the reading with everything found so far."""
        raise DiagnosticError([*self.problems, diagnostic])

    def _check_document(self, event: DocumentStartEvent, first: bool) -> None:
        if not first:
            message, label = "a second document begins here", "a file holds one"
            help = "put it into a file of its own"
            self._fatal(Diagnostic("E110", message, self._span(event), label, help=help))
        if event.version or event.tags:
            at = self.source.text.rfind("%", 0, self._span(event).start)
            message, span = "specs have no directives", self.source.span(at, at + 1)
            self.problems.error("E105", message, span, "not allowed", help="remove the line")

    def _span(self, event: Event) -> Span:
        start: int = event.start_mark.index
        end: int = event.end_mark.index
        limit = len(self.source.text)
        return self.source.span(min(start, limit), min(max(start, end), limit))

    def _node(self, event: Event, depth: int) -> Node:
        if depth > MAX_DEPTH:
            message = f"this is nested more than {MAX_DEPTH} levels deep"
            self._fatal(Diagnostic("E107", message, self._span(event), "too deep"))
        self._check_plain(event)
        if isinstance(event, MappingStartEvent):
            return self._mapping(event, depth)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(event, depth)
        if isinstance(event, ScalarEvent):
            return Scalar(event.value, bool(event.style), self._span(event))
        return Scalar("", True, self._span(event))

    def _check_plain(self, event: Event) -> None:
        span = self._span(event)
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) or _tagged(event):
            word = _MARK.match(self.source.text, span.start)
            span = self.source.span(span.start, word.end() if word else span.end)
            message = "specs have no anchors, aliases or tags"
            self.problems.error("E105", message, span, "not allowed", help=_OWN_MECHANISM)
        elif isinstance(event, ScalarEvent) and (bad := _CONTROL.search(event.value)):
            message = f"the control character U+{ord(bad[0]):04X} is not allowed"
            self.problems.error("E109", message, span, "in this text", help="remove the escape")

    def _sequence(self, event: SequenceStartEvent, depth: int) -> Sequence:
        items: list[Node] = []
        for child in self.events:
            if isinstance(child, SequenceEndEvent):
                end = self._end(event, child, items[-1].span if items else None)
                return Sequence(tuple(items), end)
            items.append(self._node(child, depth + 1))
        raise AssertionError("the parser closes what it opens")

    def _mapping(self, event: MappingStartEvent, depth: int) -> Mapping:
        entries: dict[str, Entry] = {}
        last: Span | None = None
        for child in self.events:
            if isinstance(child, MappingEndEvent):
                return Mapping(self._end(event, child, last), entries)
            key = self._node(child, depth + 1)
            value = self._node(next(self.events), depth + 1)
            # Where a value is missing, the reader's place is that of the next token.
            if value.span.start == value.span.end and (
                colon := _COLON.match(self.source.text, key.span.end)
            ):
                value = Scalar("", False, self.source.span(colon.end(), colon.end()))
            last = value.span
            if self._check_key(key, entries):
                assert isinstance(key, Scalar)
                entries[key.value] = Entry(key.span, value)
        raise AssertionError("the parser closes what it opens")

    def _check_key(self, key: Node, entries: dict[str, Entry]) -> bool:
        if not isinstance(key, Scalar) or not (key.value or key.quoted):
            label = "nothing before the `:`" if isinstance(key, Scalar) else f"this is {kind(key)}"
            self.problems.error("E106", "a key must be a name", key.span, label)
            return False
        if key.value == "<<" and not key.quoted:
            message = "specs have no merge keys"
            self.problems.error("E105", message, key.span, "not allowed", help=_OWN_MECHANISM)
            return False
        if key.value in entries:
            first = [Label(entries[key.value].key_span, "first given here")]
            message, help = f"`{key.value}` is given twice", "keep one of the two"
            self.problems.error("E104", message, key.span, "given again", first, help)
            return False
        return True

    def _end(self, begin: CollectionStartEvent, end: Event, last: Span | None) -> Span:
        """The span of a collection. A block one ends with its last child, not at the next line."""
        start = self._span(begin)
        if begin.flow_style or last is None:
            return start.to(self._span(end))
        return self.source.span(start.start, max(start.start, last.end))

    def _syntax_error(self, error: MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        at = min(mark.index, len(self.source.text)) if mark else 0
        # An error at the end of the text is shown after the last token.
        if at >= len(self.source.text.rstrip()):
            at = len(self.source.text.rstrip())
        span = self.source.span(at, min(at + 1, len(self.source.text)))
        line = self.source.line(span.line)
        if "\t" in line[: len(line) - len(line.lstrip())]:
            tab = span.start - span.column + 1 + line.index("\t")
            message, span = "a tab indents this line", self.source.span(tab, tab + 1)
            self.problems.error("E108", message, span, "a tab", help="indent by spaces")
            return
        problem = str(error.problem or error.context or "")
        message, help = _explain(problem)
        related = []
        if error.context_mark is not None and error.context_mark.index < at:
            begin = error.context_mark.index
            if self.source.span(begin, begin).line != span.line or "{" in problem + message:
                related = [
                    Label(self.source.span(begin, begin + 1), "while reading what begins here")
                ]
        self.problems.error("E103", message, span, "here", related, help)


def _tagged(event: Event) -> bool:
    return getattr(event, "tag", None) is not None


# The reader's words -> ours; the first match counts.
_EXPLANATIONS = (
    ("mapping values are not allowed", "a `:` is not allowed here",
     "put quotes around text that holds `: `, and indent keys of one mapping alike"),
    ("could not find expected ':'", "this line has no `key: value`",
     "write a `:` and a space after the key"),
    ("expected <block end>", "this line does not fit the lines above it",
     "indent keys of one mapping alike, and quote text that begins with a quote or bracket"),
    ("expected ',' or '}'", "this `{` is not closed", "add `}`, or `,` between two entries"),
    ("expected ',' or ']'", "this `[` is not closed", "add `]`, or `,` between two items"),
    ("unexpected end of stream", "the text ends inside a quoted value", "close the quotes"),
    ("unexpected document separator", "a quoted value is not closed", "close the quotes"),
    ("unknown escape character", "unknown escape in a quoted text",
     "write two backslashes for one, or use single quotes"),
    ("cannot start any token", "a value cannot begin with this character",
     "put quotes around the value"),
    ("expected the node content", "a value is missing here",
     "write one, or remove the punctuation"),
    ("sequence entries are not allowed", "a `- ` item is not allowed here",
     "begin the list on a line of its own"),
    ("expected alphabetic or numeric", "an anchor or alias without a name", _OWN_MECHANISM),
)  # fmt: skip


def _explain(problem: str) -> tuple[str, str]:
    for words, message, help in _EXPLANATIONS:
        if words in problem:
            return message, help
    return f"this is not YAML: {problem}", ""
