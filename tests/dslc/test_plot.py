"""`dslc plot`: what is drawn of the metrics of runs."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from backends.report.curves import ticks
from dslc.curves import charts, heats
from tests.dslc.conftest import Run


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


def test_of_many_layers_the_worst_and_the_mean_are_drawn() -> None:
    drawn = {c.title: c for c in charts({"a": metrics(30, layers=9)})}
    assert [line.name for line in drawn["MaxVio"].lines] == ["a worst layer", "a mean"]


def test_loads_are_shares() -> None:
    one, two = heats({"a": metrics(30)})
    assert (one.title, two.title) == ("model.layers.0.mlp", "model.layers.1.mlp")
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


def test_what_cannot_be_drawn(dslc: Run, tmp_path: Path) -> None:
    outcome = dslc("plot", tmp_path)
    assert outcome.status == 1
    assert "has no metrics to draw" in outcome.err
    assert dslc("plot", tmp_path, "-o", "x.gif").status == 2


def test_a_picture_is_written_where_matplotlib_is_installed(dslc: Run, tmp_path: Path) -> None:
    write(tmp_path / "a", metrics(30))
    outcome = dslc("plot", tmp_path / "a", "-o", "page.png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert outcome.status == 1
        assert "a picture needs matplotlib" in outcome.err
    else:
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
