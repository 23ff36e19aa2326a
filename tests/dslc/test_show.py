"""`dslc show`: the numbers of the graph, in tables that line up."""

from __future__ import annotations

import json
import re

import pytest

from dslc.commands.show import table
from dslc.specs import shipped
from tests.support.command import Run
from tests.support.golden import Golden

V3, TINY = shipped()["deepseek_v3"], shipped()["deepseek_v3_tiny"]


@pytest.mark.slow
def test_the_whole_text(dslc: Run, golden: Golden) -> None:
    outcome = dslc("show", TINY, "--seq", "128", "--context", "200")
    assert (outcome.status, outcome.err) == (0, "")
    golden("cli/show_tiny.txt", outcome.out)


@pytest.mark.slow
def test_the_published_numbers_of_v3(dslc: Run) -> None:
    out = dslc("show", V3).out
    lines = dict(re.findall(r"^(\w[\w ]+?)  +([\d,]+)  ", out, re.M))
    assert lines["parameters"] == "671,026,419,200"
    assert lines["active"] == "37,552,297,472"
    assert lines["stored"] == "684,489,845,504"
    assert lines["cache bytes"] == "70,272"
    assert lines["training FLOPs"].startswith("250,44") or lines["training FLOPs"].startswith(
        "250,45"
    )
    assert "multiply-add" in out and "half of the sequence" in out


@pytest.mark.slow
def test_lengths_change_the_core_of_attention_alone(dslc: Run) -> None:
    short, long = (json.loads(dslc("show", TINY, "--seq", n, "--format", "json").out) for n in "48")
    a, b = (json.dumps(facts["parameters"]) for facts in (short, long))
    assert a == b
    assert short["flops_per_token"] != long["flops_per_token"]


def test_resolved_names_the_origin_of_every_value(dslc: Run) -> None:
    out = dslc("show", TINY, "--resolved", "--set", "params.n_routed_experts=32").out
    origins = {line.split()[0]: line.split()[-1] for line in out.splitlines()}
    assert origins["params.n_routed_experts"] == "--set"
    assert re.fullmatch(rf"{re.escape(str(TINY))}:\d+:\d+", origins["params.hidden_size"])
    assert origins["architecture.block"] == "default"
    told = json.loads(dslc("show", TINY, "--resolved", "--format", "json").out)
    assert {"path": "params.hidden_size", "value": "64"}.items() <= told[
        [v["path"] for v in told].index("params.hidden_size")
    ].items()


def test_a_length_below_one_is_wrong_usage(dslc: Run) -> None:
    assert dslc("show", TINY, "--seq", "0").status == 2


def test_tables_line_up_unless_a_cell_is_very_long() -> None:
    rows = [("a", "1", "x"), ("bbb", "1000", "y"), ("c" * 60, "2", "z")]
    assert table(rows, "<><") == [
        "a       1  x",
        "bbb  1000  y",
        "c" * 60 + "     2  z",
    ]
