"""Expected texts, in tests/golden."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.places import GOLDEN

Golden = Callable[[str, str], None]


class GoldenFiles:
    """What the run compared, so that a golden file that no test reads any more is noticed."""

    def __init__(self, update: bool) -> None:
        self.update = update
        self.used: set[Path] = set()
        self.changes: list[str] = []

    def compare(self, relative_path: str, text: str) -> None:
        path = GOLDEN / relative_path
        self.used.add(path)
        expected = path.read_bytes().decode() if path.exists() else None
        if expected == text:
            return
        difference = "".join(
            difflib.unified_diff(
                (expected or "").splitlines(keepends=True),
                text.splitlines(keepends=True),
                f"golden/{relative_path}",
                "this run",
            )
        )
        if not self.update:
            state = "differs" if expected is not None else "does not exist yet"
            pytest.fail(
                f"golden/{relative_path} {state}; if the new text is right, run "
                f"`pytest --update-golden`\n{difference or '(an empty text)'}",
                pytrace=False,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        self.changes.append(difference)

    def report(self) -> tuple[list[str], list[str]]:
        """What another process may `add`."""
        return [str(path) for path in self.used], self.changes

    def add(self, report: tuple[list[str], list[str]]) -> None:
        used, changes = report
        self.used |= set(map(Path, used))
        self.changes += changes

    def unused(self) -> list[str]:
        """Golden files that nothing read. `name.yaml` is the input of `name.txt`: same stem."""
        known = {path.with_suffix("") for path in self.used}
        files = [path for path in sorted(GOLDEN.rglob("*")) if path.is_file()]
        return [str(f.relative_to(GOLDEN)) for f in files if f.with_suffix("") not in known]
