"""`dslc study`: planned, run, stopped, resumed, compared; statistics against scipy."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dslc.study.statistics import compare, fit_law, interval
from tests.support.browser import CHROMIUM, Browser
from tests.support.command import Run
from tests.support.places import ROOT

STUDIES = sorted((ROOT / "specs/studies").glob("*.yaml"))
TEXT = """study: small
about: Two small questions
spec: deepseek_v3_mini
data: [text.txt]
set:
  train.tokens: 2K
  train.sequence_length: 32
  train.batch: 8
  params.hidden_size: 32
  architecture.layers.1.repeat: 1
factors:
  mtp: {with: {}, without: {architecture.mtp.depth: 0}}
  train.bias_update: [0.01, 0]
seeds: [0, 1]
"""


# ---- statistics ---------------------------------------------------------------------------------


def test_intervals_and_paired_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    seeds = range(6)
    noise = {seed: rng.normal(0, 0.02) for seed in seeds}
    base = {seed: 1.5 + noise[seed] for seed in seeds}
    better = {seed: value - 0.03 + rng.normal(0, 0.003) for seed, value in base.items()}
    chance = (0.003, -0.002, 0.001, -0.003, 0.002, -0.0015)
    same = {seed: value + chance[seed] for seed, value in base.items()}
    found = compare({"baseline": base, "better": better, "same": same}, "baseline")
    raw = {
        name: stats.ttest_rel(list(values.values()), list(base.values())).pvalue
        for name, values in (("better", better), ("same", same))
    }
    assert found["better"].p == pytest.approx(min(1.0, 2 * raw["better"]))
    assert found["same"].p == pytest.approx(raw["same"])
    assert found["better"].verdict == "lower"
    assert found["same"].verdict == "not distinguishable"
    low, high = stats.t.interval(
        0.95, 5, loc=np.mean(list(base.values())), scale=stats.sem(list(base.values()))
    )
    assert (found["baseline"].values.low, found["baseline"].values.high) == pytest.approx(
        (low, high)
    )


def test_the_seed_is_what_pairs_runs() -> None:
    """Seeds differ far more than configurations do: unpaired, nothing could be told."""
    base = {seed: 1.0 + 0.2 * seed for seed in range(5)}
    higher = {seed: value + 0.01 + 0.0001 * seed for seed, value in reversed(base.items())}
    found = compare({"baseline": base, "higher": higher}, "baseline")
    assert found["higher"].verdict == "higher"
    assert stats.ttest_ind(list(base.values()), list(higher.values())).pvalue > 0.5


def test_where_nothing_differs_it_is_said() -> None:
    base = {0: 1.0, 1: 2.0, 2: 3.0}
    found = compare({"baseline": base, "equal": dict(base)}, "baseline")
    assert (found["equal"].p, found["equal"].verdict) == (1.0, "not distinguishable")


@pytest.mark.slow
def test_many_comparisons_need_smaller_p() -> None:
    """Of 20 comparisons without a difference, hardly ever one is called one (Holm)."""
    false = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        base = {seed: float(rng.normal()) for seed in range(4)}
        others = {f"c{i}": {s: float(rng.normal()) for s in base} for i in range(20)}
        found = compare({"baseline": base, **others}, "baseline")
        false += any(found[name].verdict != "not distinguishable" for name in others)
    assert false <= 6  # 5 % of 40, and chance


def test_one_seed_is_no_test() -> None:
    found = compare({"baseline": {0: 1.0}, "other": {0: 0.5}}, "baseline")
    assert found["other"].verdict == "one seed: no test"
    assert math.isnan(interval([1.0]).low)


def test_a_scaling_law_is_found_again() -> None:
    points = [(c, 1.2 + 400 * c**-0.3) for c in (1e9, 3e9, 1e10, 1e11, 1e12)]
    law = fit_law(points)
    assert law is not None
    assert (law.floor, law.exponent) == pytest.approx((1.2, 0.3), rel=0.02)
    assert law.at(1e13) == pytest.approx(1.2 + 400 * 1e13**-0.3, rel=0.01)
    assert fit_law(points[:3]) is None


# ---- plans --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_can_be_planned(dslc: Run, tmp_path: Path, path: Path) -> None:
    outcome = dslc("study", str(path), "--plan", "--out", str(tmp_path), "--format", "json")
    assert outcome.status == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["study"] == path.stem
    names = [one["name"] for one in plan["configurations"]]
    assert names[0] == "baseline" and len(names) > 1


def planned(dslc: Run, folder: Path, text: str) -> list[dict[str, int]]:
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    outcome = dslc(
        "study", str(folder / "s.yaml"), "--plan", "--out", str(folder / "o"), "--format", "json"
    )
    assert outcome.status == 0, outcome.err + outcome.out
    found: list[dict[str, int]] = json.loads(outcome.out)["configurations"]
    return found


@pytest.mark.slow
def test_parameters_are_held_equal_by_solving_one_value(dslc: Run, tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("factors")] + "factors: {params.n_routed_experts: [16, 8]}\n"
    free = planned(dslc, tmp_path, text)
    assert free[1]["parameters"] < 0.8 * free[0]["parameters"]
    budget = "budget: {hold: parameters, solve: params.moe_intermediate_size}\n"
    held = planned(dslc, tmp_path, text + budget)
    assert held[1]["parameters"] == pytest.approx(free[0]["parameters"], rel=0.01)


@pytest.mark.slow
def test_flops_are_held_equal_by_tokens(dslc: Run, tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("factors")] + "factors: {architecture.layers.1.repeat: [1, 3]}\n"
    first, second = planned(dslc, tmp_path, text + "budget: {hold: active_flops}\n")
    assert second["tokens"] < first["tokens"]
    assert second["training_flops"] == pytest.approx(first["training_flops"], rel=0.01)


@pytest.mark.slow
def test_an_array_job_has_a_task_for_each_run(dslc: Run, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    outcome = dslc("study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "o"), "--slurm")
    assert outcome.status == 0, outcome.err
    script = (tmp_path / "o/array.sh").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-5\n" in script
    assert '--only "$SLURM_ARRAY_TASK_ID"' in script
    assert subprocess.run(["bash", "-n", str(tmp_path / "o/array.sh")], check=False).returncode == 0


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_is_stopped_resumed_and_compared(tmp_path: Path) -> None:
    data = (ROOT / "data/tinyshakespeare.txt").read_bytes()[:6000]
    (tmp_path / "text.txt").write_bytes(data)
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    command = [sys.executable, "-m", "dslc", "study", str(tmp_path / "s.yaml")]
    command += ["--out", str(tmp_path / "o"), "--jobs", "2"]
    results = tmp_path / "o/runs"

    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(results.glob("*/*/result.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130, (tmp_path / "first.log").read_text()
    done = {path: path.stat().st_mtime_ns for path in results.glob("*/*/result.json")}
    assert 1 <= len(done) < 6
    assert "the same command resumes them" in (tmp_path / "first.log").read_text()

    # Killed at once, it leaves runs that save their state; the next one waits for them.
    with (tmp_path / "killed.log").open("w") as log:
        killed = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        logs = list(results.glob("*/*.log"))
        begun = sum(log.stat().st_size for log in logs)
        while sum(log.stat().st_size for log in results.glob("*/*.log")) == begun:
            assert time.monotonic() < deadline + 120
            time.sleep(0.05)
        killed.kill()
        killed.wait()

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs ran again"
    found = json.loads((tmp_path / "o/results.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in found["configurations"]] == [
        "baseline", "mtp=without", "bias_update=0",
    ]  # fmt: skip
    for one in found["configurations"]:
        assert sorted(one["runs"]) == ["0", "1"]
        losses = [run["loss"] for run in one["runs"].values()]
        assert one["comparison"]["values"]["mean"] == pytest.approx(np.mean(losses))
    rows = list(csv.DictReader((tmp_path / "o/results.csv").open(encoding="utf-8")))
    assert len(rows) == 6 and {row["mtp"] for row in rows} == {"with", "without"}
    page = (tmp_path / "o/study.html").read_text(encoding="utf-8")
    assert "architecture.mtp.depth" in page and "<polygon" in page
    if CHROMIUM is not None:
        look_at(tmp_path / "o/study.html", tmp_path / "profile")

    # Another spec under the same folder is refused, and no result is lost.
    text = TEXT.replace("train.batch: 8", "train.batch: 4")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert third.returncode == 1 and "E613" in third.stderr
    assert all(path.exists() for path in done)


def look_at(page: Path, profile: Path) -> None:
    """What a person sees of a study of three configurations, two of them against the baseline."""
    with Browser(profile) as browser:
        browser.size(1400, 1000)
        browser.open(page)
        assert browser.errors == []
        text = browser.evaluate("document.body.innerText")
        for word in ("baseline", "mtp=without", "bias_update=0", "2 of 2"):
            assert word in text
        assert text.count("not distinguishable") + text.count("lower") + text.count("higher") >= 2
        sizes = browser.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(s => s.clientWidth)"
        )
        assert len(sizes) >= 2 and all(200 < width <= 1400 for width in sizes)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 1400
        assert len(browser.screenshot()) > 20_000


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes((ROOT / "data/tinyshakespeare.txt").read_bytes()[:6000])
    factors = "factors: {train.learning_rate: [1e-3, 1e30]}\nseeds: [0]\n"
    text = TEXT[: TEXT.index("factors")] + factors
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "dslc", "study", str(tmp_path / "s.yaml")]
    command += ["--out", str(tmp_path / "o")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "learning_rate=1e30 seed 0: failed:" in done.stdout
    assert "learning_rate=1e30 seed 0 failed." in (tmp_path / "o/study.html").read_text()
    assert json.loads((tmp_path / "o/results.json").read_text())["configurations"][0]["runs"]["0"]
