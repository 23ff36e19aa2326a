"""`dslc passes` lists what runs; `dslc graph --after` shows what it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compiler.pipeline import PIPELINES
from dslc.specs import shipped
from tests.support.command import Run
from tests.support.golden import Golden

TINY = shipped()["deepseek_v3_tiny"]


def test_every_pass_says_what_it_is_for_and_what_it_ensures(dslc: Run) -> None:
    out = dslc("passes").out
    for program, passes in PIPELINES.items():
        assert f"{program}: lower, {', '.join(one.name for one in passes)}\n" in out
        for one in passes:
            assert one.purpose and one.ensures
            assert f"\n{one.name}: {one.purpose}\n" in out
            section = out.split(f"\n{one.name}: ")[1].split("\n\n")[0]
            programs = re.search(r"runs for: ([\w, ]+\w)( \(--skip\))?$", section, re.M)
            assert programs and program in programs[1].split(", ")
            assert (programs[2] is None) == one.essential


@pytest.mark.slow
def test_what_each_pass_did_to_a_model(dslc: Run, golden: Golden) -> None:
    out = dslc("passes", TINY).out
    golden("cli/passes_tiny.txt", re.sub(r" +(\d+\.\d|ms)(?=  |$)", "  (ms)", out, flags=re.M))


@pytest.mark.slow
def test_the_graph_after_a_pass_is_that_of_this_step(dslc: Run) -> None:
    def mla(after: str, *more: str) -> str:
        options = ("--program", "decode", "--block", "MLA", "--after", after, *more)
        return dslc("graph", TINY, *options).out

    assert "cache_entry" in mla("lower")
    assert "cache_append" in mla("insert_cache") and "latent_attention" not in mla("insert_cache")
    assert "latent_attention" in mla("absorb")
    assert dslc("graph", TINY, "--program", "decode", "--block", "MLA").out == mla("simplify")
    assert "latent_attention" not in mla("simplify", "--skip", "absorb")
    assert "latent_attention" not in mla("simplify", "--only-until", "insert_cache")


@pytest.mark.slow
def test_a_build_without_a_pass(dslc: Run) -> None:
    assert dslc("build", TINY, "--skip", "fuse_experts", "-o", "loop").status == 0
    assert "F.grouped_linear" not in Path("loop/model.py").read_text(encoding="utf-8")
    assert dslc("build", TINY, "--only-until", "absorb", "-o", "until").status == 0
    decode = Path("until/graph/decode.graph").read_text(encoding="utf-8")
    assert "latent_attention" in decode and "grouped_linear" not in decode


@pytest.mark.slow
def test_the_nearest_pass_is_offered(dslc: Run) -> None:
    outcome = dslc("graph", TINY, "--program", "decode", "--after", "absorbe")
    assert outcome.status == 1
    assert "the model has no pass 'absorbe'" in outcome.err
    assert "did you mean `absorb`?" in outcome.err
    # Nothing is absorbed where nothing is remembered.
    assert dslc("graph", TINY, "--after", "absorb").status == 1


@pytest.mark.parametrize("command", ["build", "graph", "passes"])
def test_passes_that_cannot_be_left_out_are_all_named(
    dslc: Run, golden: Golden, command: str
) -> None:
    options = ("--skip", "simplify", "--skip", "absorbe", "--only-until", "nothing")
    outcome = dslc(command, TINY, *options)
    assert (outcome.status, outcome.out) == (1, "")
    golden("cli/skip.txt", outcome.err)
