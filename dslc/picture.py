"""The picture of `dslc plot`: the charts of its page, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends.report.curves import (
    COLOURS,
    STRONGEST,
    WEAKEST,
    Chart,
    Heat,
    in_ratios,
    log_ticks,
    style,
)
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.units import format_count

WIDTH = 13.0
CHART, HEAT = 3.5, 1.7
"""Inches, of the whole and of a row."""
DPI = 120
MARKERS = ("o", "s", "^", "D", "v", "P")


def write_png(path: Path, charts: Sequence[Chart], heats: Sequence[Heat], runs: int) -> None:
    """Raises `DiagnosticError` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        help = "pip install matplotlib, or write a page: -o curves.html"
        problem = Diagnostic("E601", "a picture needs matplotlib", help=help)
        raise DiagnosticError([problem]) from None
    some = [chart for chart in charts if chart.lines]
    # The loads of one layer in all runs are side by side.
    columns = min(max(runs, 2), 4)
    rows, heat_rows = -(-len(some) // 2), -(-len(heats) // columns)
    heights = [CHART * rows, HEAT * heat_rows + 0.5] if heats else [CHART * rows]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    top, *bottom = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    top.suptitle(
        "Losses and MaxVio are smoothed; a number in a legend is the last", fontsize="small"
    )
    for number, chart in enumerate(some, 1):
        _draw(top.add_subplot(rows, 2, number), chart)
    for below in bottom:
        _colour(below, heats, heat_rows, columns)
    figure.savefig(path)


def _draw(axes: Any, chart: Chart) -> None:
    axes.set_title(chart.title, fontsize="medium", fontweight="bold", loc="left")
    for i, line in enumerate(chart.lines):
        x, y = zip(*line.points, strict=True)
        dots = {"marker": MARKERS[line.run % len(MARKERS)], "ls": ":", "ms": 5}
        look = dots if line.dots else {"ls": _dash(style(chart, i))}
        colour = COLOURS[line.run % len(COLOURS)]
        axes.plot(x, y, label=f"{line.name}  {y[-1]:.4g}", color=colour, lw=1.2, **look)
    if in_ratios(chart):
        axes.set_yscale("log")
        axes.set_yticks(log_ticks(*axes.get_ylim()), minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")
    _tokens(axes)
    axes.set_xlim(left=0)
    axes.set_ylabel(chart.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Outside the axes, so that it hides nothing.
    axes.legend(
        fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2
    )


def _dash(pattern: str) -> Any:
    """The same as an SVG's `stroke-dasharray`."""
    return (0, tuple(float(part) for part in pattern.split())) if pattern else "-"


def _tokens(axes: Any) -> None:
    axes.xaxis.set_major_formatter(lambda x, _: format_count(round(x)))
    axes.set_xlabel("tokens")


def _colour(figure: Any, heats: Sequence[Heat], rows: int, columns: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    figure.suptitle("Load of experts (1: the mean)", fontweight="bold", fontsize="medium")
    colours = LinearSegmentedColormap.from_list("load", [WEAKEST, "white", STRONGEST])
    drawn = []
    for number, heat in enumerate(heats, 1):
        axes = figure.add_subplot(rows, columns, number)
        shares = [[math.log2(max(share, 0.25)) for share in row] for row in heat.shares]
        ends = (heat.tokens[0], heat.tokens[-1], len(shares[0]) - 0.5, -0.5)
        image = axes.imshow(
            list(zip(*shares, strict=True)), cmap=colours, vmin=-2, vmax=2, extent=ends,
            aspect="auto", interpolation="nearest"
        )  # fmt: skip
        axes.set_title(heat.title, fontsize="small", loc="left")
        axes.set_ylabel("expert", fontsize="small")
        axes.tick_params(labelsize="small")
        _tokens(axes)
        drawn.append((axes, image))
    key = figure.colorbar(
        drawn[0][1], ax=[axes for axes, _ in drawn], ticks=[-2, -1, 0, 1, 2], aspect=40
    )
    key.ax.set_yticklabels(["¼ or less", "½", "1", "2", "4 or more"], fontsize="small")
