"""The values of a spec as builds tell them: without folders, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compiler.graph.svg import short_name
from dsl.load import Description, Resolved


def values(description: Description) -> Iterator[Resolved]:
    """Path, value and origin of each value, without the folders in which files happened to lie."""
    for value in description.resolved():
        origin = value.origin
        for source in description.sources:
            if origin.startswith(f"{source.name}:"):
                origin = short_name(source) + origin.removeprefix(source.name)
                break
        yield replace(value, origin=origin)
