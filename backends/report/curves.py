"""The page of `dslc plot`: curves over tokens, and experts' load as colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backends.report.html import environment
from dsl.units import format_count

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
POINTS = 400
"""Of a line; more would not be seen."""
COLOURS = ("#1f5fa8", "#c2571a", "#2f7d3b", "#7a4fa3", "#a33a4a", "#4d7f8c")
DASHES = ("", "5 3", "2 2", "8 3 2 3")
"""Of the lines of one run in one chart, as `stroke-dasharray`."""
WEAKEST, STRONGEST = "#1f5fa8", "#c2571a"
"""Of an expert's load: a quarter of its share, four times its share."""


@dataclass(frozen=True)
class Curve:
    """Points (tokens, value) of the run with the number `run`, which decides on the colour."""

    name: str
    run: int
    points: tuple[tuple[int, float], ...]
    dots: bool = False
    band: tuple[tuple[int, float, float], ...] = ()
    """(tokens, low, high) of an area around the line."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: tuple[Curve, ...]
    log: bool = False
    """Equal ratios are equally far apart: a loss falls fast at first, and slowly for long."""


@dataclass(frozen=True)
class Heat:
    """`shares[i]` are the experts' at `tokens[i]`: 1 is an even share."""

    title: str
    tokens: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class AxisLabel:
    """A label on an axis, and its position."""

    place: float
    text: str


def render_curves(
    title: str, charts: Sequence[Chart], heats: Sequence[Heat], *, version: str
) -> str:
    """Text of the page. Charts without a line are left out."""
    return (
        environment()
        .get_template("curves.html.jinja")
        .render(
            title=title,
            charts=[draw(chart) for chart in charts if chart.lines],
            heats=[_coloured(heat) for heat in heats],
            version=version,
            size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": HEIGHT - BOTTOM},
        )
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= about)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def style(chart: Chart, number: int) -> str:
    """The dashes of a line: each line of one run has its own."""
    line = chart.lines[number]
    alike = sum(1 for other in chart.lines[:number] if other.run == line.run and not other.dots)
    return DASHES[alike % len(DASHES)]


def in_ratios(chart: Chart) -> bool:
    """Whether the axis of values is logarithmic: some values have no logarithm."""
    return chart.log and all(y > 0 for line in chart.lines for _, y in line.points)


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high`, in as fine a scale as gives no more than `most`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in (1, 1.5, 2, 3, 5), (1, 2, 5), (1,):
        places = [mark * 10.0**power for power in powers for mark in marks]
        found = [place for place in places if low <= place <= high]
        if len(found) <= most:
            break
    return found if len(found) > 1 else ticks(low, high)


def draw(chart: Chart) -> dict[str, object]:
    """A chart as `chart.html.jinja` takes it: places in pixels, colours, marks on the axes."""
    points = [point for line in chart.lines for point in line.points]
    right = max(x for x, _ in points) or 1
    log = in_ratios(chart)
    scale = math.log if log else float
    low, high = _range([y for _, y in points], log)
    across = (WIDTH - LEFT - RIGHT) / right
    up = (HEIGHT - TOP - BOTTOM) / (scale(high) - scale(low))

    def place(x: float, y: float) -> tuple[float, float]:
        inside = scale(min(max(y, low), high))
        return round(LEFT + x * across, 1), round(HEIGHT - BOTTOM - (inside - scale(low)) * up, 1)

    lines = []
    for i, line in enumerate(chart.lines):
        places = [place(x, y) for x, y in _fewer(line.points)]
        lines.append(
            {
                "name": line.name,
                "colour": COLOURS[line.run % len(COLOURS)],
                "dash": "" if line.dots else style(chart, i),
                "dots": places if line.dots else [],
                "path": "" if line.dots else " ".join(f"{x},{y}" for x, y in places),
                "band": " ".join(f"{x},{y}" for x, y in (place(*p) for p in _outline(line.band))),
                "last": f"{line.points[-1][1]:.4g}",
            }
        )
    return {
        "title": chart.title,
        "unit": chart.unit,
        "lines": lines,
        "across": [AxisLabel(place(x, low)[0], format_count(x)) for x in ticks(0, right)],
        "up": [
            AxisLabel(place(0, y)[1], f"{y:.4g}") for y in (log_ticks if log else ticks)(low, high)
        ],
    }


def _outline(band: Sequence[tuple[int, float, float]]) -> list[tuple[int, float]]:
    """The points around an area: its lower edge, then its upper edge backwards."""
    low = _fewer([(x, low) for x, low, _ in band]) if band else []
    high = _fewer([(x, high) for x, _, high in band]) if band else []
    return [*low, *reversed(high)]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Where an axis begins and ends: a few values far above all others do not count."""
    ordered = sorted(value for value in values if math.isfinite(value)) or [0.0]
    if log:
        return ordered[0] / 1.05, ordered[-1] * 1.05
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(len(ordered) * 0.995))]
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return min(low, max(0.0, low - margin)), high + margin


def _fewer(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    stride = max(1, len(points) // POINTS)
    return [*points[::stride], points[-1]]


def _coloured(heat: Heat) -> dict[str, object]:
    """Cells of a picture: white is an even share, blue less, orange more (doubling a step)."""
    experts = len(heat.shares[0])
    cells = [
        {"x": x, "y": y, "colour": _colour(share), "text": f"expert {y}: {share:.2f}"}
        for x, column in enumerate(heat.shares)
        for y, share in enumerate(column)
    ]
    ends = f"{format_count(heat.tokens[0])} to {format_count(heat.tokens[-1])} tokens"
    size = {"columns": len(heat.shares), "experts": experts}
    return {"title": heat.title, "cells": cells, "ends": ends, **size}


def _colour(share: float) -> str:
    strength = min(1.0, abs(math.log2(max(share, 0.25))) / 2)
    red, green, blue = (31, 95, 168) if share < 1 else (194, 87, 26)
    mixed = [round(255 - (255 - part) * strength) for part in (red, green, blue)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
