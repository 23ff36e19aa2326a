"""The passes that a command line names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dsl.diagnostic import Diagnostic, DiagnosticError

if TYPE_CHECKING:
    from compiler.passes.base import Pass


def check(skip: Sequence[str] | None, until: str | None) -> None:
    """Raises `DiagnosticError` for a pass that does not exist or cannot be skipped."""
    known = passes()
    problems = [
        unknown("pass", name, known)
        for name in (*(skip or ()), *([until] if until else ()))
        if name not in known
    ]
    problems += [
        Diagnostic(
            "E693",
            f"`{name}` cannot be skipped: programs need it",
            help=f"others can: {', '.join(n for n, one in known.items() if not one.essential)}",
        )
        for name in skip or ()
        if name in known and known[name].essential
    ]
    if problems:
        raise DiagnosticError(problems)


def pipelines() -> dict[str, tuple[Pass, ...]]:
    """The passes of each program; those of the first MTP module are those of any."""
    from compiler.pipeline import PIPELINES, draft_name, draft_passes

    return {**PIPELINES, draft_name(0): draft_passes(0)}


def passes() -> dict[str, Pass]:
    """Every pass by name, in the order in which they first run."""
    return {one.name: one for passes in pipelines().values() for one in passes}


def programs_of(name: str) -> list[str]:
    """The programs that run a pass."""
    return [p for p, passes in pipelines().items() if name in {one.name for one in passes}]


def unknown(what: str, name: str, known: Iterable[str]) -> Diagnostic:
    """The error for an unknown program, block or pass, with the nearest known one."""
    from dsl.suggest import did_you_mean

    help = did_you_mean(name, known) or f"it has {', '.join(known)}"
    return Diagnostic("E691", f"the model has no {what} {name!r}", help=help)
