"""`dslc tune` without a GPU: which candidates are measured, which win, what a build makes of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.triton import tune
from backends.triton.package import kernel_files
from backends.triton.target import TARGETS
from backends.triton.tuning_table import TuningTable, shipped, tuned
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.command import Run
from tests.support.places import ROOT

TINY = load(ROOT / "specs/deepseek_v3_tiny.yaml", sets=["precision.policy=fp8_blockwise"])
PROGRAMS = compile(TINY).programs
SM_90 = TARGETS["sm_90"]


def clock(*times: float) -> tune.Timer:
    """A stopwatch that runs nothing and shows these times, again and again."""
    shown = itertools.cycle(times)

    def timer(call: Callable[[], Any]) -> float:
        return next(shown)

    return timer


def fine(kernel: Any, reference: Any, case: Any) -> str:
    return ""


def test_every_candidate_of_every_key_is_measured_once() -> None:
    choices = TuningTable()
    kernel_files(PROGRAMS, TINY, SM_90, choices)
    rounds = list(tune.measure(PROGRAMS, TINY, SM_90, clock(1.0), fine))
    measured = sorted((key, name) for one in rounds for key, name in one.taken.items())
    keys = {**choices.asked, **choices.files}
    assert measured == sorted((key, n) for key, names in keys.items() for n in names)
    # What no case looks at has no time, and so no winner.
    assert 0 < len(tune.winners(rounds)) <= len(keys)
    # Files that compute the same are measured after tiles, kernels with the best of these.
    (last,) = (r for r in rounds if "cublas" in r.taken.values())
    assert last.microseconds["F.linear 64x128 m1"] == 1.0


def test_a_library_that_computes_something_else_never_wins() -> None:
    def wrong(kernel: Any, reference: Any, case: Any) -> str:
        return "two runs differ" if kernel.__module__.endswith("cublas") else ""

    rounds = list(tune.measure(PROGRAMS, TINY, SM_90, clock(1.0), wrong))
    names = {name for key, name in tune.winners(rounds).items() if key.startswith("F.linear")}
    assert names == {"linear"}


def test_the_fastest_wins_and_what_fails_never_does() -> None:
    def one(name: str, time: float) -> tune.TuningRound:
        return tune.TuningRound({"linear m64": name, "other": name}, {"linear m64": time})

    failed = tune.TuningRound({"linear m64": "d"}, {})
    rounds = [one("a", 3.0), one("b", 1.0), one("c", 2.0), failed]
    assert tune.winners(rounds) == {"linear m64": "b"}
    assert tune.times(rounds) == {"linear m64": {"a": 3.0, "b": 1.0, "c": 2.0}}
    assert tune.winners([failed]) == {}


def test_a_build_takes_the_winners(dslc: Run, tmp_path: Path) -> None:
    choices = TuningTable()
    kernel_files(PROGRAMS, TINY, SM_90, choices)
    last = {key: names[-1] for key, names in choices.asked.items()}
    rounds = [tune.TuningRound(last, dict.fromkeys(last, 1.0))]
    file = tmp_path / "tuned.json"
    file.write_text(tune.text_of(rounds, SM_90, "a GPU"))
    spec, out = str(ROOT / "specs/deepseek_v3_tiny.yaml"), tmp_path / "tiny"
    asked = (spec, "--set", "precision.policy=fp8_blockwise", "--target", "sm_90", "-o", str(out))
    assert dslc("build", *asked).status == 0
    before = (out / "kernels/fp8_linear.py").read_text()
    assert dslc("build", *asked, "--tuned", str(file)).status == 0
    after = (out / "kernels/fp8_linear.py").read_text()
    assert before != after and "Tile(128, 128" in after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no file that `dslc tune` wrote"),
        ('{"target": "sm_90", "choices": {"linear": 3}}', "is no file that `dslc tune` wrote"),
        ('{"target": "sm_100", "choices": {}}', "was measured for sm_100"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(DiagnosticError) as raised:
        tuned(file, "sm_90")
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "E607" and message in diagnostic.message


def test_what_a_file_does_not_say_is_what_is_shipped(tmp_path: Path) -> None:
    known = shipped("sm_90").measured
    key = next(iter(known))
    rounds = [tune.TuningRound({key: "attention", "here": "8x8"}, {key: 1.0, "here": 1.0})]
    file = tmp_path / "tuned.json"
    file.write_text(tune.text_of(rounds, SM_90, "a GPU"))
    assert tuned(file, "sm_90").measured == {**known, key: "attention", "here": "8x8"}
    head = json.loads(file.read_text())
    assert head["gpu"] == "a GPU" and head["torch"] and head["triton"]


def test_candidates_that_are_gone(tmp_path: Path) -> None:
    choices = TuningTable()
    kernel_files(PROGRAMS, TINY, SM_90, choices)
    stale = {next(iter(choices.asked)): {"fastest": "9x9", "us": {"9x9": 1.0}}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"target": "sm_90", "choices": stale}))
    with pytest.raises(DiagnosticError, match="'9x9'"):
        kernel_files(PROGRAMS, TINY, SM_90, tuned(file, "sm_90"))


def test_without_a_gpu_or_a_target(dslc: Run) -> None:
    spec = str(ROOT / "specs/deepseek_v3_tiny.yaml")
    outcome = dslc("tune", spec)
    assert outcome.status == 1 and "E608" in outcome.err and "this machine has none" in outcome.err
    outcome = dslc("build", spec, "--tuned", "tuned.json")
    assert outcome.status == 1 and "add --target" in outcome.err
