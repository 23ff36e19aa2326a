"""`dslc calibrate`: what two ranks measure, and `dslc plan` with it; `dslc doctor` on them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dsl.load import load
from dsl.measured import calibration_of
from runtime.train.measure import line
from tests.support.command import Run
from tests.support.places import TINY
from tests.support.processes import ended, environments, started

CLUSTER = "cluster: mine\nnodes: 1\ngpus_per_node: 2\n"
SETS = [
    "train.batch=4", "train.sequence_length=16", "train.micro_batch=1",
    "parallel={cluster: ./mine.yaml, pipeline: 1, expert: 2, batch: 4, sequence_length: 16}",
]  # fmt: skip
CHANGES = [word for change in SETS for word in ("--set", change)]
BOTH = """
import os, shlex, sys
from dslc.cli import main
from runtime.train import measure

def status(line):
    sys.argv = ["dslc", *shlex.split(line)]
    try:
        main()
    except SystemExit as end:
        return end.code

first, second, port = sys.argv[1:]
print("status", status(first), flush=True)
os.environ["MASTER_PORT"] = port
product = measure.product

def slowly(*given):
    work = product(*given)
    return lambda: [work() for _ in range(8)]

if os.environ["RANK"] == "1":
    measure.product = slowly
print("status", status(second), flush=True)
"""
DOCTOR = "doctor --seconds 0 --megabytes 1 --slow 0.3 --out ."


def test_a_line_through_sizes() -> None:
    assert line([(100, 1.5), (300, 2.5), (900, 5.5)]) == (200.0, 1.0)
    assert line([(100, 2.0)]) == (50.0, 0.0)
    assert line([(100, 3.0), (900, 2.0)]) == (450.0, 0.0)  # noise: the larger was faster


@pytest.mark.slow
def test_two_ranks_measure_what_a_plan_needs(
    dslc: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CLUSTER, encoding="utf-8")
    assert "predicted" not in dslc("plan", TINY, *CHANGES).out
    (tmp_path / "both.py").write_text(BOTH, encoding="utf-8")
    words = shlex.join(["calibrate", str(TINY), *CHANGES, "--seconds", "0"])
    another_port = environments(1)[0]["MASTER_PORT"]
    ranks = started(["both.py", words, DOCTOR, another_port], folder=tmp_path)
    (out, err), _ = ended(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], err
    wrote, _, examined = out.partition("status 0\n")
    assert wrote == "wrote mine.measured.yaml\n", out
    # The rank whose products are slow is named, and no other.
    assert examined.endswith("status 1\n")
    told = [one for one in examined.splitlines() if "standard product" in one]
    assert len(told) == 1 and told[0].startswith("problem: rank 1 on "), examined
    rows = [one.split() for one in examined.splitlines() if one[:2] in ("0 ", "1 ")]
    assert [len(row) for row in rows] == [6, 6]
    found = calibration_of(load(TINY, sets=SETS), None)  # it lies beside the cluster file
    assert found is not None
    measured = found[0]
    shapes = {(p.dtype, p.weight_grad, p.groups > 1) for p in measured.products}
    assert {("fp32", False, False), ("fp32", True, False), ("fp32", False, True)} <= shapes
    assert measured.attention is not None and measured.memory_bandwidth
    links = (measured.dispatch, measured.combine, measured.ring)
    assert all(link is not None and link.bandwidth > 0 for link in links)
    assert measured.pair is None  # the plan has one stage
    # The plan predicts with it, beside what a run measured.
    printed = json.loads(dslc("plan", TINY, *CHANGES, "--format", "json").out)["prediction"]
    assert printed["calibration"].endswith("mine.measured.yaml") and printed["step_seconds"] > 0
    run = tmp_path / "run"
    run.mkdir()
    performance = {"tokens_per_second": 320.0, "mfu": None, "memory_bytes": 10**9}
    record = {"main": 1.0, "performance": {**performance, "waited_least": 0.25}}
    lines = [json.dumps({**record, "step": step}) for step in range(3)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = dslc("plan", TINY, *CHANGES, "--measured", run).out
    [row] = [one.split() for one in table.splitlines() if one.startswith("s  ")]
    assert row == ["s", f"{printed['step_seconds']:,.3f}", "0.200"]  # 64 tokens; no peak rates
    # A file that exists stays.
    again = dslc("calibrate", TINY, *CHANGES, "--seconds", "0")
    assert again.status == 1 and "E692" in again.err
