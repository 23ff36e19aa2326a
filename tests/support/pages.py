"""The page of a build, and pages as data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from backends.report import render_report
from compiler.analysis import summary
from compiler.pipeline import compile
from compiler.plan.make import make_plan
from dsl.load import load

FILES = ("__init__.py", "model.py", "graph/00-all-lower.graph", "odd name?.txt")


VOID = {"meta", "br"}


def report(path: Path, *sets: str) -> str:
    description = load(path, sets=sets)
    compiled = compile(description)
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    plan = make_plan(description, compiled)
    return render_report(description, compiled, numbers, version="1.2.3", files=FILES, plan=plan)


@dataclass
class Page(HTMLParser):
    """Elements of a page, and its text; fails where they are not properly nested."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.words.append(" ")  # cells of a table are words apart

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name: str) -> Iterator[str]:
        return (attrs[name] or "" for _, attrs in self.tags if name in attrs)
