"""The documents as data: their tables, and their examples."""

from __future__ import annotations

import re
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A fenced text; `name` is the file that its first line says it is."""

    language: str
    name: str
    text: str


def examples(text: str) -> list[Example]:
    """Every fenced text of a document, in order."""
    found = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        name = re.match(r"# (\w+\.\w+)\n", body)
        found.append(Example(language, name[1] if name else "", body))
    return found


def tables(text: str, first: str) -> list[Row]:
    """Rows of every table whose first column is called `first`, without headings."""
    rows: list[Row] = []
    inside = False
    for line in text.splitlines():
        cells = tuple(c.strip() for c in line.strip("|").split("|")) if line[:1] == "|" else ()
        if not cells:
            inside = False
        elif not inside and cells[0] == first:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            rows.append(cells)
    assert rows, f"no table begins with {first!r}"
    return rows


def sections(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them, and those set by hand."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    made = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return made | set(re.findall(r'<a id="([\w-]+)">', text))


def commands(example: Example) -> list[tuple[str, str]]:
    """Commands of a `console` example, each with what the document says that it prints."""
    if example.language != "console":
        return []
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", example.text, re.M)
