"""`dslc plot`: charts of the metrics of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = """
\b
Examples:
  dslc plot runs/mini                          writes runs/mini/curves.html
  dslc plot runs/mini runs/no_mtp -o both.html     both in each chart
  dslc plot runs/mini -o mini.png                  an image; needs matplotlib
"""


def run(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Run directories of `dslc train`.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="*.html or *.png; curves.html in the first run."
        ),
    ] = None,
) -> None:
    """Plot losses, balance, gradient norms and the load of experts, of one or several runs."""
    from backends import VERSION
    from backends.report.curves import render_curves
    from dslc.curves import charts, heats, read_metrics
    from dslc.picture import write_png
    from dslc.report import reporting
    from dslc.specs import shown
    from runtime.files import replace_text

    path = output or runs[0] / "curves.html"
    if path.suffix not in (".html", ".png"):
        raise typer.BadParameter("the name of the file must end in .html or .png")
    with reporting():
        found = {_name(one, runs): read_metrics(one) for one in runs}
        drawn, loads = list(charts(found)), list(heats(found))
        if path.suffix == ".png":
            write_png(path, drawn, loads, len(found))
        else:
            page = render_curves(", ".join(found), drawn, loads, version=VERSION)
            replace_text(path, page)
    print(f"wrote {shown(path)}")


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The name of the folder, or the whole path if another run has the same name."""
    names = [one.resolve().name for one in runs]
    name = run.resolve().name
    return name if names.count(name) == 1 else str(run)
