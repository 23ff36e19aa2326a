"""The documents as data: their tables, and their examples."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def follow(text: str, folder: Path, run: Callable[[str], str]) -> int:
    """Writes the files of a document into `folder` and runs its commands, in order.

    Fails where one prints something else than the text says. Returns how many there were.
    """
    seen = 0
    for example in examples(text):
        if example.name:
            (folder / example.name).write_text(example.text, encoding="utf-8")
        if example.language != "console":
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", example.text, re.M):
            seen += 1
            printed = run(command)
            same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
            assert same, f"$ {command}\nprints\n{printed}\nand the text says\n{expected}"
    return seen
