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


@dataclass(frozen=True)
class Line:
    """Points (tokens, value) of the run with the number `run`, which decides on the colour."""

    name: str
    run: int
    points: tuple[tuple[int, float], ...]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Heat:
    """`shares[i]` are the experts' at `tokens[i]`: 1 is an even share."""

    title: str
    tokens: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Mark:
    """A label on an axis, and where it stands."""

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
            charts=[_drawn(chart) for chart in charts if chart.lines],
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


def _drawn(chart: Chart) -> dict[str, object]:
    points = [point for line in chart.lines for point in line.points]
    right = max(x for x, _ in points) or 1
    low, high = _range([y for _, y in points])
    across = (WIDTH - LEFT - RIGHT) / right
    up = (HEIGHT - TOP - BOTTOM) / (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, low), high)
        return round(LEFT + x * across, 1), round(HEIGHT - BOTTOM - (inside - low) * up, 1)

    lines = []
    for i, line in enumerate(chart.lines):
        places = [place(x, y) for x, y in _fewer(line.points)]
        alike = sum(1 for other in chart.lines[:i] if other.run == line.run)
        lines.append(
            {
                "name": line.name,
                "colour": COLOURS[line.run % len(COLOURS)],
                "dash": "" if line.dots else ("", "5 3", "2 2", "8 3 2 3")[alike % 4],
                "dots": places if line.dots else [],
                "path": "" if line.dots else " ".join(f"{x},{y}" for x, y in places),
                "last": f"{line.points[-1][1]:.4g}",
            }
        )
    return {
        "title": chart.title,
        "unit": chart.unit,
        "lines": lines,
        "across": [Mark(place(x, low)[0], format_count(x)) for x in ticks(0, right)],
        "up": [Mark(place(0, y)[1], f"{y:.4g}") for y in ticks(low, high)],
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends: a few values far above all others do not count."""
    ordered = sorted(value for value in values if math.isfinite(value)) or [0.0]
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
