"""`dslc doctor`: what is slow or differs is named. `test_calibrate.py` has two ranks, one slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.train.doctor import Checks, RankReport, problems
from tests.support.command import Run
from tests.support.places import TINY


@pytest.mark.slow
def test_one_process_is_well_and_too_few_for_a_plan(dslc: Run, tmp_path: Path) -> None:
    words = ["--seconds", "0", "--megabytes", "1"]
    outcome = dslc("doctor", *words, "--out", tmp_path)
    assert outcome.status == 0 and outcome.out.endswith("\nall is well\n")
    section = "parallel={cluster: cpu_2x2, pipeline: 2, expert: 2, batch: 8, sequence_length: 64}"
    outcome = dslc("doctor", TINY, "--set", section, *words)
    assert outcome.status == 1
    assert outcome.out.endswith("\nproblem: the plan is for 4 ranks, and 1 were started\n")
    outcome = dslc("doctor", *words, "--out", tmp_path / "none")
    assert outcome.status == 1 and outcome.err.startswith("error: ")


VERSIONS = {"torch": "2.13.0", "device": "H800"}
WELL = [
    RankReport(i, f"node{i // 2}", VERSIONS, 80 * 10**9, 600e12, {i ^ 1: 40e9}, 2e9)
    for i in range(4)
]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"product": 450e12}, ["rank 3 on node1 is slow: standard product at 75% of"]),
        ({"product": 490e12}, []),  # above the threshold of 80 %
        ({"pairs": {2: 10e9, 1: 39e9, 0: 8e9}}, ["rank 3 on node1 is slow: messages at 25% of"]),
        ({"disk": 1e9}, ["rank 3 on node1 is slow: disk at 50% of"]),
        ({"host": "node2"}, ["node0 has 2 ranks, others have 1"]),
        ({"versions": {**VERSIONS, "torch": "2.12"}}, ["rank 3 on node1: torch 2.12, others have"]),
        ({"memory": 40 * 10**9}, ["rank 3 on node1: 40.0 GB of memory, and the plan needs 70.0"]),
        ({"failure": "cannot write to /x"}, ["rank 3 on node1: cannot write to /x"]),
    ],
)
def test_every_difference_is_one_line(change: Mapping[str, object], told: list[str]) -> None:
    reports = [*WELL[:3], replace(WELL[3], **change)]
    found = list(problems(reports, Checks(needed=70 * 10**9)))
    assert len(found) == len(told)
    for one, start in zip(found, told, strict=True):
        assert one.startswith(start), one
