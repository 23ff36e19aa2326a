"""Diagnostics: what is wrong, where, why, and how to mend it; rendered for people and for tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsl.source import Span


@dataclass(frozen=True)
class Label:
    """A second place that explains the first, for example where a value was set."""

    span: Span
    text: str


@dataclass(frozen=True)
class Diagnostic:
    """One problem. `message` is a sentence in the user's words, `label` is printed at the caret.

    `help` is a concrete edit. Codes: E1xx YAML and files, E2xx block language, E3xx values and
    expressions of a spec, E4xx types and dimensions, E5xx graph, E6xx output.
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    related: tuple[Label, ...] = ()
    help: str = ""

    def sort_key(self) -> tuple[str, int, str, str]:
        if self.span is None:
            return ("", 0, self.code, self.message)
        return (self.span.source.name, self.span.start, self.code, self.message)


class DiagnosticError(Exception):
    """Raised by a stage that cannot hand over its result; carries every problem found."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = sorted(diagnostics, key=Diagnostic.sort_key)
        super().__init__("; ".join(d.message for d in self.diagnostics))


class Diagnostics:
    """Collects the problems of a stage; each is kept once."""

    def __init__(self) -> None:
        self._items: dict[Diagnostic, None] = {}

    def add(self, diagnostic: Diagnostic) -> None:
        self._items.setdefault(diagnostic)

    def error(
        self,
        code: str,
        message: str,
        span: Span | None = None,
        label: str = "",
        related: Iterable[Label] = (),
        help: str = "",
    ) -> None:
        self.add(Diagnostic(code, message, span, label, tuple(related), help))

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for diagnostic in diagnostics:
            self.add(diagnostic)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(sorted(self._items, key=Diagnostic.sort_key))

    def __len__(self) -> int:
        return len(self._items)

    def raise_if_any(self) -> None:
        """Raises `DiagnosticError` with everything collected so far, if there is anything."""
        if self._items:
            raise DiagnosticError(self._items)


def render(diagnostics: Iterable[Diagnostic]) -> str:
    """Plain text in the manner of rustc: message, place, source line, caret, help."""
    return "\n".join(_render_one(d) for d in diagnostics)


def _render_one(diagnostic: Diagnostic) -> str:
    lines = [f"error[{diagnostic.code}]: {printable(diagnostic.message)}"]
    width = max(
        [len(str(s.line)) for s in [diagnostic.span, *(r.span for r in diagnostic.related)] if s],
        default=1,
    )
    if diagnostic.span is not None:
        lines += _excerpt(diagnostic.span, diagnostic.label, width, "-->", "^")
    for related in diagnostic.related:
        lines += _excerpt(related.span, related.text, width, ":::", "-")
    if diagnostic.help:
        lines.append(f"{' ' * width} = help: {printable(diagnostic.help)}")
    return "\n".join(lines) + "\n"


LONGEST = 400
"""Characters of a line that are shown: a `config.json` may be one line of any length."""


def _excerpt(span: Span, label: str, width: int, arrow: str, mark: str) -> list[str]:
    text, at = span.source.line(span.line), span.column - 1
    # A span over several lines is marked to the end of its first one.
    length = max(1, min(span.end - span.start, len(text) - at))
    if len(text) > LONGEST:
        first = max(0, min(at - LONGEST // 4, len(text) - LONGEST))
        before, last = ".. " if first else "", first + LONGEST
        text = f"{before}{text[first:last]}{' ..' if last < len(text) else ''}"
        at += len(before) - first
        length = max(1, min(length, len(before) + LONGEST - at))
    indent = "".join("\t" if c == "\t" else " " for c in text[:at])
    gutter = " " * width
    return [
        f"{gutter}{arrow} {printable(span.location)}",
        f"{gutter} |",
        f"{span.line:>{width}} | {printable(text)}",
        f"{gutter} | {indent}{mark * length} {printable(label)}".rstrip(),
    ]


def to_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    """The same facts for editors and CI; lines and columns count from 1."""
    return [
        {
            "code": d.code,
            "severity": "error",
            "message": d.message,
            **_place(d.span),
            "label": d.label,
            "related": [{**_place(r.span), "text": r.text} for r in d.related],
            "help": d.help,
        }
        for d in diagnostics
    ]


def _place(span: Span | None) -> dict[str, Any]:
    if span is None:
        return {"file": None, "line": None, "column": None, "end_line": None, "end_column": None}
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(span.end)
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
    }


def printable(text: str) -> str:
    """`text` with control characters shown, so that a spec cannot steer the terminal."""
    return "".join(c if c == "\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
