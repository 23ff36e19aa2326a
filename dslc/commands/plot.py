"""`dslc plot`: what happened in runs, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.report.curves import Chart

EXAMPLES = """
\b
Examples:
  dslc plot runs/mini                          writes runs/mini/curves.html
  dslc plot runs/mini runs/no_mtp -o both.html     one over the other
  dslc plot runs/mini -o mini.png                  a picture; needs matplotlib
"""


def run(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS", help="Folders of `dslc train`.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="*.html or *.png; curves.html in the first run."
        ),
    ] = None,
) -> None:
    """Draw losses, balance, gradients and the load of experts, several runs over one another."""
    from backends import VERSION
    from backends.report.curves import render_curves
    from dslc.curves import charts, heats, read_metrics
    from dslc.report import reporting
    from dslc.specs import shown

    path = output or runs[0] / "curves.html"
    if path.suffix not in (".html", ".png"):
        raise typer.BadParameter("the name of the file must end in .html or .png")
    with reporting():
        found = {_name(one, runs): read_metrics(one) for one in runs}
        drawn = list(charts(found))
        if path.suffix == ".png":
            write_png(path, drawn)
        else:
            title = ", ".join(found)
            page = render_curves(title, drawn, list(heats(found)), version=VERSION)
            path.write_text(page, encoding="utf-8")
    print(f"wrote {shown(path)}")


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The last folder, or the whole path where another run has the same one."""
    names = [one.resolve().name for one in runs]
    name = run.resolve().name
    return name if names.count(name) == 1 else str(run)


def write_png(path: Path, charts: Sequence[Chart]) -> None:
    """The same charts by matplotlib. Raises `DiagnosticError` where it is not installed."""
    from backends.report.curves import COLOURS
    from dsl.diagnostic import Diagnostic, DiagnosticError

    try:
        from matplotlib.figure import Figure
    except ImportError:
        help = "pip install matplotlib, or write a page: -o curves.html"
        problem = Diagnostic("E601", "a picture needs matplotlib", help=help)
        raise DiagnosticError([problem]) from None
    some = [chart for chart in charts if chart.lines]
    figure = Figure(figsize=(12, 3.2 * -(-len(some) // 2)), layout="constrained")
    for number, chart in enumerate(some, 1):
        axes: Any = figure.add_subplot(-(-len(some) // 2), 2, number)
        axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title)
        for line in chart.lines:
            x, y = zip(*line.points, strict=True)
            style = {"marker": "o", "linestyle": ""} if line.dots else {"linewidth": 1.2}
            axes.plot(x, y, label=line.name, color=COLOURS[line.run % len(COLOURS)], **style)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
