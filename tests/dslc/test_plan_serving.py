"""`dslc plan --serve`: DeepSeek-V3's published day, and what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsl.diagnostic import DiagnosticError
from dsl.expert_load import read_load
from tests.support.command import Run
from tests.support.places import SPECS, TINY

V3 = SPECS / "deepseek_v3.yaml"


@pytest.mark.slow
def test_the_published_day_of_v3(dslc: Run) -> None:
    """Computed by hand: what a term takes, for 64, 88 and 128 requests a GPU.

    H800 with 3.35 TB/s, 1979 and 989 TFLOP/s, 160 GB/s inside and 40 across nodes; 4,989 tokens of
    cache of 70,272 bytes; 8 experts to and from which 7,392 and 14,336 bytes go in 58 layers.
    """
    told = json.loads(dslc("plan", V3, "--serve", "deepseek_day6", "--format", "json").out)
    expected = {
        "requests": (64, 88, 128),
        "weights": (22.3e9, 22.3e9, 22.3e9),
        "cache": (22.4e9, 30.9e9, 44.9e9),
        "memory": (13.4e-3, 15.9e-3, 20.1e-3),
        "products": (2.37e-3, 3.26e-3, 4.74e-3),
        "core": (5.48e-3, 7.54e-3, 10.97e-3),
        "sending": (16.1e-3, 22.2e-3, 32.3e-3),
    }
    for name, values in expected.items():
        assert [step[name] for step in told["steps"]] == pytest.approx(values, rel=0.01)
    prompt = {"products": 36.0e-6, "core": 12.6e-6, "across": 94.5e-6, "inside": 31.5e-6}
    assert {name: told["prompt"][name] for name in prompt} == pytest.approx(prompt, rel=0.01)
    assert told["decode_bytes"] + told["mtp_bytes"][0] == pytest.approx(24.6e9, rel=0.01)
    assert told["prefill_bytes"] == pytest.approx(42.1e9, rel=0.01)
    assert told["cache_transfer"] == pytest.approx(8.8e-3, rel=0.01)
    # 226.75 nodes were reported in all.
    assert told["prefill_nodes"] == pytest.approx(95.5, rel=0.01)
    assert told["decode_nodes"] == pytest.approx(131.4, rel=0.01)


@pytest.mark.slow
def test_the_bounds_of_that_day(dslc: Run, tmp_path: Path) -> None:
    """And how redundant experts spread a load of which eight experts have half."""
    load = [256 if expert % 32 == 0 else 8 for expert in range(256)]
    loads = {"load": {"model.layers.3.mlp": load, "model.layers.4.mlp": load[::-1]}}
    (tmp_path / "load.json").write_text(json.dumps(loads), encoding="utf-8")
    words = ("--serve", "deepseek_day6", "--load", tmp_path / "load.json")
    out = dslc("plan", V3, *words).out
    rows = {line.split("  ")[0]: line.split()[-3:] for line in out.splitlines()}
    assert rows["bound, overlapped: tokens/s and node"][-1] == "84,641"
    assert ["31,740", "31,740", "31,740"] in [
        line.split()[-3:] for line in out.splitlines() if "overlapped" in line
    ]
    assert rows["bound, in turn: tokens/s and node"] == ["17,359", "18,499", "19,570"]
    # A decoding GPU has 28 tokens on average. The busiest has one of the eight alone, or a fifth of
    # it and one other, or a ninth of it and one other.
    expected = [256 / 28, (256 / 5 + 8) / 28, (256 / 9 + 8) / 28]
    assert rows["decode unit, worst layer"] == [f"{x:.2f}" for x in expected]
    # One of four nodes of prefill has two of the eight on 8 GPUs, which have 126 tokens on average:
    # a GPU has one and seven others, two fifths and seven others, or two eighths and eight others.
    expected = [(256 + 7 * 8) / 126, (2 * 256 / 5 + 7 * 8) / 126, (2 * 256 / 8 + 8 * 8) / 126]
    assert rows["prefill unit, mean of layers"] == [f"{x:.2f}" for x in expected]


@pytest.mark.slow
def test_traffic_of_one_s_own(dslc: Run, tmp_path: Path) -> None:
    """Without measured rates the bounds count; half of the hits, more to compute."""
    text = (SPECS / "traffic" / "deepseek_day6.yaml").read_text(encoding="utf-8")
    mine = text.partition("measured:")[0].replace("requests: [64, 88, 128]", "requests: 100")
    for name, cached in (("a", "0.5"), ("b", "0")):
        (tmp_path / f"{name}.yaml").write_text(mine.replace("342 / 608", cached), encoding="utf-8")
    first, second = (
        json.loads(dslc("plan", V3, "--serve", tmp_path / f"{n}.yaml", "--format", "json").out)
        for n in "ab"
    )
    assert second["prefill_nodes"] == pytest.approx(2 * first["prefill_nodes"])
    (step,) = first["steps"]
    assert step["requests"] == 100
    seconds = max(step["memory"], step["products"] + step["core"]) + step["sending"]
    assert first["decode_nodes"] == pytest.approx(168e9 / 86400 / (800 / seconds))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((V3, "--serve", "deepseek_day7"), "did you mean `deepseek_day6`?"),
        ((V3, "--serve", "none.yaml"), "E100"),
        ((TINY, "--serve", "deepseek_day6"), "E532"),
        ((V3, "--serve", "deepseek_day6", "--cluster", "cpu_2x2"), "does not say"),
    ],
)
def test_what_cannot_be_planned(dslc: Run, words: tuple[str | Path, ...], message: str) -> None:
    outcome = dslc("plan", *words)
    assert outcome.status == 1 and message in outcome.err and not outcome.out


def test_a_wrong_traffic_file_is_told_with_its_places(dslc: Run, tmp_path: Path) -> None:
    text = (SPECS / "traffic" / "deepseek_day6.yaml").read_text(encoding="utf-8")
    text = text.replace("342 / 608", "1.5").replace("context: 4989", "contxt: 4989", 1)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    outcome = dslc("plan", V3, "--serve", tmp_path / "mine.yaml")
    assert outcome.status == 1
    for part in ("mine.yaml:7:9", "cached above 1", "contxt", "context"):
        assert part in outcome.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "has no loads"),
        ('{"load": {"a": [1, 2]}}', "`a` needs 16 whole numbers"),
        ('{"load": {"a": 1}}', "`a` needs 16 whole numbers"),
    ],
)
def test_a_wrong_load_file_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DiagnosticError) as caught:
        read_load(path, 16)
    (problem,) = caught.value.diagnostics
    assert problem.code == "E122" and message in problem.message
    assert problem.span is not None and problem.span.location.startswith(f"{path}:1:")


def test_loads_are_for_serving(dslc: Run) -> None:
    outcome = dslc("plan", V3, "--load", "load.json")
    assert outcome.status == 1 and "--load is for --serve" in outcome.err
