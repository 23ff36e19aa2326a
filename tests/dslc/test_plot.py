"""`dslc plot`: what is drawn of the metrics of runs."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from backends.report.curves import COLOURS, AxisLabel, Curve, draw, in_ratios, log_ticks, ticks
from dslc.curves import charts, heats
from dslc.picture import CHART, DPI, HEAT, WIDTH
from tests.support.command import Run


def metrics(
    steps: int, shift: float = 0.0, layers: int = 2, depths: int = 1
) -> list[dict[str, Any]]:
    """A run whose loss falls, with expert 0 taking ever more of two experts' load."""
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        load = {"load": [step, 10]} if step % 10 == 0 else {}
        use = {"max_vio": step / 100, "entropy": 0.5, "bias_range": 0.1, **load}
        records.append(
            {
                "step": step,
                "tokens": 100 * step,
                "main": shift + 1 / step,
                "mtp": [2.0] * depths,
                "gradient_norm": 1.0,
                "learning_rate": 1e-3,
                "experts": {f"model.layers.{i}.mlp": use for i in range(layers)},
            }
        )
    held_out = {"loss": shift + 0.5, "mtp": [2.0] * depths, "acceptance": [0.7] * depths}
    return [*records, {"step": steps, "held_out": held_out}, {"step": steps, "warning": "w"}]


def test_every_run_is_in_every_chart() -> None:
    drawn = {c.title: c for c in charts({"a": metrics(30), "b": metrics(50, 1.0, depths=0)})}
    loss = drawn["Loss"].lines
    assert [line.name for line in loss] == ["a", "b", "a held out", "b held out"]
    assert [line.run for line in loss] == [0, 1, 0, 1]
    assert loss[2].points == ((3000, 0.5),) and loss[2].dots
    assert [p[0] for p in loss[0].points] == [100 * n for n in range(1, 31)]
    # Smoothed: 0.9 of the point before.
    assert loss[0].points[1][1] == pytest.approx(0.9 * 1.0 + 0.1 * 0.5)
    assert [line.name for line in drawn["Loss of multi-token prediction"].lines] == ["a depth 1"]
    assert [p for line in drawn["Acceptance of multi-token prediction"].lines
            for p in line.points] == [(3000, 0.7)]  # fmt: skip
    assert [line.name for line in drawn["MaxVio"].lines] == [
        "a layer 0", "b layer 0", "a layer 1", "b layer 1",
    ]  # fmt: skip
    # The same layer of all runs stands side by side.
    loads = heats({"a": metrics(30), "b": metrics(50)})
    assert [h.title for h in loads] == ["a: layer 0", "b: layer 0", "a: layer 1", "b: layer 1"]


def test_of_many_layers_the_worst_and_the_mean_aredraw() -> None:
    drawn = {c.title: c for c in charts({"a": metrics(30, layers=9)})}
    assert [line.name for line in drawn["MaxVio"].lines] == ["a mean", "a worst layer"]
    runs = {name: metrics(30, layers=2) for name in "abcd"}
    drawn = {c.title: c for c in charts(runs)}
    names = [line.name for line in drawn["MaxVio"].lines]
    assert names == [f"{run}{what}" for what in (" mean", " worst layer") for run in "abcd"]


def test_loads_are_shares() -> None:
    one, two = heats({"a": metrics(30)})
    assert (one.title, two.title) == ("layer 0", "layer 1")
    assert one.tokens == (1000, 2000, 3000)
    assert one.shares[0] == (1.0, 1.0) and one.shares[2] == (1.5, 0.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.99, 1.01), (0, 123456), (1e-4, 3e-3), (5, 5)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert len(found) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    if high > low:
        assert len(found) >= 2
        step = found[1] - found[0]
        digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(digits - d) for d in (1, 2, 5, 10)) < 1e-6


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 3', encoding="utf-8")


def test_a_page_is_written(dslc: Run, tmp_path: Path) -> None:
    write(tmp_path / "a<b", metrics(30))
    write(tmp_path / "c", metrics(40))
    outcome = dslc("plot", tmp_path / "a<b", tmp_path / "c", "-o", "page.html")
    assert outcome.status == 0, outcome.err
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a&lt;b" in text and "a<b" not in text
    assert "<script" not in text and "http:" not in text
    pictures = text.split("<svg")[1:]
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.split("</svg>")[0] + "</svg>")
    assert text.count('role="img"') == 6 + 4  # charts, and two layers of each run
    assert dslc("plot", tmp_path / "c").status == 0
    assert (tmp_path / "c" / "curves.html").exists()


def test_what_cannot_bedraw(dslc: Run, tmp_path: Path) -> None:
    outcome = dslc("plot", tmp_path)
    assert outcome.status == 1
    assert "has no metrics to draw" in outcome.err
    for name, text in (("empty", ""), ("begun", '{"step": 1, "warning": "w"}\n{"step": 2, "ma')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        outcome = dslc("plot", tmp_path / name)
        assert outcome.status == 1 and "no step is recorded yet" in outcome.err
    assert dslc("plot", tmp_path, "-o", "x.gif").status == 2


def colours_of(path: Path) -> tuple[tuple[int, int], Counter[str]]:
    """The size of a picture, and how often it has each colour."""
    from PIL import Image

    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(2**24)
        return image.size, Counter({f"#{r:02x}{g:02x}{b:02x}": n for n, (r, g, b) in found})


@pytest.mark.slow
def test_a_picture_shows_all_runs_and_the_load_of_their_experts(dslc: Run, tmp_path: Path) -> None:
    write(tmp_path / "a", metrics(30))
    write(tmp_path / "b", metrics(50, 1.0))
    outcome = dslc("plot", tmp_path / "a", tmp_path / "b", "-o", "two.png")
    assert outcome.status == 0, outcome.err
    size, found = colours_of(tmp_path / "two.png")
    # Three rows of charts; one of each layer's load in both runs, and their title.
    assert size == (round(WIDTH * DPI), round((3 * CHART + 2 * HEAT + 0.5) * DPI))
    assert found[COLOURS[0]] > 500 and found[COLOURS[1]] > 500
    # An even share is white; here expert 0 comes to have up to 1.67 times its own, in large cells.
    assert found["#ffffff"] > 1000
    cells = [c for c, n in found.items() if n > 3000 and c not in ("#ffffff", *COLOURS)]
    assert len(cells) >= 6


def test_a_picture_needs_matplotlib(
    dslc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", metrics(30))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = dslc("plot", tmp_path / "a", "-o", "page.png")
    assert outcome.status == 1
    assert "a picture needs matplotlib" in outcome.err


def test_losses_aredraw_in_ratios() -> None:
    (loss, *_) = charts({"a": metrics(100)})
    assert in_ratios(loss)
    drawn = draw(loss)
    heights = {mark.text: mark.place for mark in cast(list[AxisLabel], drawn["up"])}
    assert heights["0.1"] - heights["0.2"] == pytest.approx(heights["0.5"] - heights["1"], abs=0.2)
    # A value without a logarithm: the axis is linear.
    assert not in_ratios(replace(loss, lines=(Curve("a", 0, ((1, 0.0), (2, 1.0))),)))


@pytest.mark.parametrize(("low", "high"), [(1.3, 1.45), (1.2, 6.0), (0.2, 7.0), (1e-5, 50.0)])
def test_ticks_of_ratios_are_few_and_inside(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low <= tick <= high + 1e-9 for tick in found)
