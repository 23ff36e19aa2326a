"""From the SPEC of a command line to a checked description."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.suggest import nearest
from dslc.report import note
from specs import SPECS

if TYPE_CHECKING:
    from dsl.load import Description


def read(spec: str, sets: Sequence[str] | None, variants: Sequence[str] | None) -> Description:
    """The description of a spec file. Raises `DiagnosticError` with every problem in it."""
    from dsl.load import load

    return load(find(spec), sets=sets or (), variants=variants or ())


def find(spec: str) -> Path:
    """The file that `spec` means: a path, or, where no such path exists, a shipped spec's name.

    Raises `DiagnosticError` naming the nearest file when there is neither.
    """
    path = Path(spec)
    if path.exists():
        return path
    if spec in shipped():
        found = shown(shipped()[spec])
        note(f"there is no file {spec!r} here; using the shipped {found}")
        return Path(found)
    folder = path.parent
    siblings = [str(folder / f.name) for f in folder.glob("*.yaml")] if folder.is_dir() else []
    # `v3.yml` or `other/deepseek_v3.yaml` may mean the shipped spec of that name.
    near = nearest(spec, [*siblings, *shipped()]) or nearest(path.stem, shipped())
    help = f"did you mean `{near}`?" if near else "`dslc init NAME` starts a new spec"
    raise DiagnosticError([Diagnostic("E100", f"there is no spec {spec!r}", help=help)])


def shipped() -> dict[str, Path]:
    """The specs that come with dslc, by name."""
    return {path.stem: path for path in sorted(SPECS.glob("*.yaml"))}


def shown(path: Path) -> str:
    """A path relative to the working directory, if it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
