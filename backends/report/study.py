"""The page of `dslc study`: what was compared, how sure it is, curves, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.report.curves import BOTTOM, HEIGHT, LEFT, WIDTH, Chart, draw
from backends.report.html import environment


@dataclass(frozen=True)
class ConfigurationRow:
    """One configuration, in the words of the table; `verdict` compares it with the baseline."""

    name: str
    parameters: int
    active_parameters: int
    flops: int
    runs: str
    loss: str
    interval: str
    difference: str
    p: str
    verdict: str
    max_vio: str
    seconds: str


@dataclass(frozen=True)
class Change:
    """What a configuration has that the baseline has not: values, and lines of its graphs."""

    name: str
    values: Sequence[tuple[str, str, str]]
    operators: Sequence[str]


def render_study(
    title: str,
    about: str,
    facts: Sequence[tuple[str, str]],
    rows: Sequence[ConfigurationRow],
    charts: Sequence[Chart],
    changes: Sequence[Change],
    notes: Sequence[str],
    *,
    version: str,
) -> str:
    """Text of the page. Charts without a line are left out."""
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            title=title,
            about=about,
            facts=facts,
            rows=rows,
            charts=[draw(chart) for chart in charts if chart.lines],
            changes=changes,
            notes=notes,
            version=version,
            size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": HEIGHT - BOTTOM},
        )
    )
