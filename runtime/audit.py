"""What a conversion says of every tensor: `audit.json`, and a table of it.

A row has `name`, `how`, perhaps `copy_of`, and `read` and `written`: lists of parts, the scales of
an FP8 weight being the second. A part has name, file, dtype, shape and the sha256 of its bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .recode import ConvertedTensor, StoredTensor, TensorSpec
from .shards import DTYPES, Problem
from .sources import TensorSource

AUDIT = "audit.json"
Row = dict[str, Any]

_NUMBER = re.compile(r"[0-9]{1,18}")


def row(wanted: TensorSpec, source: TensorSource, made: ConvertedTensor, file: str) -> Row:
    """What is said of one tensor, written to `file`."""
    files = [e.file.name for e in (source.entry, source.scale) if e is not None]
    said: Row = {"name": wanted.name, "how": made.how}
    if wanted.copy_of:
        said["copy_of"] = wanted.copy_of
    said["read"] = [_about(part, f) for part, f in zip(made.read, files, strict=True)]
    said["written"] = [_about(part, file) for part in made.made]
    return said


def _about(part: StoredTensor, file: str) -> Row:
    shape = list(part.shape)
    hash = part.sha256
    return {"name": part.name, "file": file, "dtype": part.dtype, "shape": shape, "sha256": hash}


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """A JSON list, one row a line."""
    before = "["
    for one in rows:
        yield f"{before}\n{json.dumps(one)}"
        before = ","
    yield "[]" if before == "[" else "\n]"


def known_hashes(folder: Path) -> tuple[dict[str, str], list[Problem]]:
    """Name -> sha256 of each tensor that a conversion wrote to a folder; none without an audit."""
    path = folder / AUDIT
    if not path.exists():
        return {}, []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return {str(p["name"]): str(p["sha256"]) for one in rows for p in one["written"]}, []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"cannot be read ({type(error).__name__}); without it, bytes are not compared"
        return {}, [Problem(text, AUDIT)]


@dataclass
class NameRange:
    """Tensors whose names differ only in numbers, and that were converted alike."""

    count: int = 0
    bytes: int = 0
    numbers: list[tuple[int, int]] = field(default_factory=list)
    """The least and the greatest of each number in the names."""

    def add(self, one: Row) -> None:
        found = [int(text) for text in _NUMBER.findall(one["name"])]
        ranges = self.numbers or [(n, n) for n in found]
        self.numbers = [
            (min(low, n), max(high, n)) for (low, high), n in zip(ranges, found, strict=True)
        ]
        self.count += 1
        self.bytes += sum(_size(part) for part in one["written"])


Key = tuple[str, str, str, str, str]
"""Pattern of the name, shape, types read, types written, how."""


class Table:
    """Rows of an audit, those alike as one."""

    def __init__(self) -> None:
        self.groups: dict[Key, NameRange] = {}

    def add(self, one: Row) -> None:
        how = f"copy of {one['copy_of']}" if "copy_of" in one else one["how"]
        key = (
            _NUMBER.sub("{}", one["name"].replace("{", "(").replace("}", ")")),
            " x ".join(map(str, one["written"][0]["shape"])),
            " + ".join(part["dtype"] for part in one["read"]),
            " + ".join(part["dtype"] for part in one["written"]),
            how,
        )
        self.groups.setdefault(key, NameRange()).add(one)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Name, number of tensors, shape of each, read as, written as, how, bytes written."""
        for (pattern, shape, read, written, how), group in self.groups.items():
            spans = [str(a) if a == b else f"{a}..{b}" for a, b in group.numbers]
            name, count = pattern.format(*spans), f"{group.count:,}"
            yield (name, count, shape, read, written, how, f"{group.bytes:,}")


def _size(part: Row) -> int:
    return math.prod(part["shape"]) * DTYPES[part["dtype"]].itemsize
