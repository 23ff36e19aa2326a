"""The page of `dslc graph --html`: where it goes, and with what it opens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from backends import VERSION
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description


def write(
    description: Description,
    output: Path | None,
    program: str,
    after: str | None,
    block: str | None,
    *,
    skip: Collection[str],
    until: str | None,
) -> None:
    """Writes the page and says where. Raises `DiagnosticError`; a file of others is one reason."""
    from backends.report.steps import render_steps
    from compiler.pipeline import compile
    from dslc.passes import unknown
    from dslc.specs import shown

    compiled = compile(description, skip=skip, until=until)
    steps = compiled.steps_of(program)
    last = max(i for i, s in enumerate(steps) if s.name == (after or steps[-1].name))
    if block is not None and block not in steps[last].program.graphs:
        raise DiagnosticError([unknown("block", block, steps[last].program.graphs)])
    # Without a step or a block it begins at the beginning.
    start = f"{program}-{last if after or block else 0}{f'/{block}' if block else ''}"
    text = render_steps(description, compiled, version=VERSION, start=start)
    path = output or Path(f"{description.spec.model}.html")
    if path.exists() and not _ours(path):
        message = f"{path} exists and is no page of dslc"
        raise DiagnosticError([Diagnostic("E692", message, help="choose another file with -o")])
    path.write_text(text, encoding="utf-8")
    print(f"wrote {shown(path)}: {len(text.encode()) // 1000:,} KB")


def _ours(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="dslc ' in file.read(2000)
