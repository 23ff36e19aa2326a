"""`dslc explain`: what an error code means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
\b
Examples:
  dslc explain E401
  dslc explain          every code with its title
"""
# One section a code: `## E401 title`.
CATALOG = Path(__file__).parent.parent / "errors.md"


def run(
    code: Annotated[
        str | None, typer.Argument(help="A code such as E401.", show_default=False)
    ] = None,
) -> None:
    """Explain an error code, or list them all."""
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dslc.report import reporting

    sections = catalog()
    with reporting():
        if code is None:
            for known, (title, _) in sections.items():
                print(f"{known}  {title}")
        elif code.upper() in sections:
            title, text = sections[code.upper()]
            print(f"{code.upper()}: {title}\n\n{text}")
        else:
            message = f"there is no error {code!r}"
            help = "`dslc explain` lists them all"
            raise DiagnosticError([Diagnostic("E691", message, help=help)])


def catalog() -> dict[str, tuple[str, str]]:
    """Title and text of every code, in order."""
    parts = re.split(r"^## (E\d{3}) (.+)\n", CATALOG.read_text(encoding="utf-8"), flags=re.M)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {code: (title, text.strip()) for code, title, text in found}
