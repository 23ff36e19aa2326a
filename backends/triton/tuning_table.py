"""What was measured on a GPU: the fastest tile of a kernel, and whether a library is faster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsl.diagnostic import Diagnostic, DiagnosticError

T = TypeVar("T")

SHIPPED = {"sm_90": Path(__file__).parent / "h200.json"}
"""What comes with dslc, by target."""


@dataclass(frozen=True)
class RowRange:
    """Which file serves from so many rows to so many, both included; None is any number."""

    first: int
    last: int | None
    file: str


class TuningTable:
    """The fastest candidate by key, as `measured` on a GPU.

    There are two kinds of keys. `fp8_linear n7168 m4096` decides between the tiles of a kernel.
    `fp8.linear 7168x2048 m4096` decides between the files that serve a function, at a size and a
    number of rows: a kernel of dslc, or a library. `asked` holds the keys of the first kind that a
    build has looked up, `files` those of the second, with the names of their candidates: what
    `dslc tune` has to measure.
    """

    def __init__(self, measured: Mapping[str, str] | None = None, source: str = "") -> None:
        self.measured = measured or {}
        self.source = source
        self.asked: dict[str, tuple[str, ...]] = {}
        self.files: dict[str, tuple[str, ...]] = {}

    def pick(self, key: str, candidates: Mapping[str, T], best: str) -> T:
        """The candidate that was measured to be fastest, or `best`, which a model thinks is.

        Raises `DiagnosticError` where what was measured is no candidate any more.
        """
        self.asked[key] = tuple(candidates)
        name = self.measured.get(key, best)
        self._check(key, name, self.asked[key])
        return candidates[name]

    def ranges(self, what: str, files: Sequence[str]) -> list[RowRange]:
        """Which of `files` serves `fp8.linear 7168x2048`, by rows; the first if none was measured.

        A number of rows between two that were measured is served as the larger one, more than the
        largest as that. Raises `DiagnosticError` where what was measured is none of the files.
        """
        prefix, found, first = f"{what} m", list[RowRange](), 1
        measured = {
            int(key.removeprefix(prefix)): (key, name)
            for key, name in self.measured.items()
            if key.startswith(prefix)
        }
        for rows, (key, name) in sorted(measured.items()):
            self._check(key, name, files)
            if found and found[-1].file == name:
                first = found.pop().first
            found.append(RowRange(first, rows, name))
            first = rows + 1
        if not found:
            return [RowRange(1, None, files[0])]
        return [*found[:-1], RowRange(found[-1].first, None, found[-1].file)]

    def _check(self, key: str, name: str, candidates: Sequence[str]) -> None:
        if name not in candidates:
            why = (
                f"{self.source}: {key} was measured with {name!r}, which builds do not have any"
                f" more; there are {', '.join(candidates)}"
            )
            help = "measure again with `dslc tune`"
            raise DiagnosticError([Diagnostic("E607", why, help=help)])


def shipped(target: str) -> TuningTable:
    """What was measured for a target on a GPU of the project; nothing for some targets."""
    return read(SHIPPED[target], target) if target in SHIPPED else TuningTable()


def tuned(path: Path, target: str) -> TuningTable:
    """What a file of `dslc tune` says, and what is shipped where it says nothing.

    Raises `DiagnosticError` for a file that is no such one.
    """
    here = read(path, target)
    return TuningTable({**shipped(target).measured, **here.measured}, here.source)


def read(path: Path, target: str) -> TuningTable:
    """The choices in a file. Raises `DiagnosticError` where it was not measured for the target."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["target"]
        choices = {key: choice["fastest"] for key, choice in content["choices"].items()}
        if not all(isinstance(name, str) for name in choices.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        why = f"{path} is no file that `dslc tune` wrote"
        raise DiagnosticError([Diagnostic("E607", why, help="make one with `dslc tune`")]) from None
    if found != target:
        why = f"{path} was measured for {found}, this build is for {target}"
        raise DiagnosticError([Diagnostic("E607", why, help=f"measure on a {target} GPU")])
    return TuningTable(choices, str(path))
