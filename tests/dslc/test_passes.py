"""`dslc passes` lists what runs; `dslc graph --after` shows what it does."""

from __future__ import annotations

from compiler.pipeline import PIPELINES
from dslc.specs import shipped
from tests.dslc.conftest import Run

TINY = shipped()["deepseek_v3_tiny"]


def test_every_pass_says_what_it_is_for_and_what_it_ensures(dslc: Run) -> None:
    out = dslc("passes").out
    for program, passes in PIPELINES.items():
        assert f"{program}: lower, {', '.join(one.name for one in passes)}\n" in out
        for one in passes:
            assert one.purpose and one.ensures
            assert f"\n{one.name}: {one.purpose}\n" in out


def test_the_graph_after_a_pass_is_that_of_this_step(dslc: Run) -> None:
    def mla(after: str) -> str:
        return dslc("graph", TINY, "--program", "decode", "--block", "MLA", "--after", after).out

    assert "cache_entry" in mla("lower")
    assert "cache_append" in mla("insert_cache") and "latent_attention" not in mla("insert_cache")
    assert "latent_attention" in mla("absorb")
    assert dslc("graph", TINY, "--program", "decode", "--block", "MLA").out == mla("simplify")


def test_the_nearest_pass_is_offered(dslc: Run) -> None:
    outcome = dslc("graph", TINY, "--program", "decode", "--after", "absorbe")
    assert outcome.status == 1
    assert "the model has no pass 'absorbe'" in outcome.err
    assert "did you mean `absorb`?" in outcome.err
    # Nothing is absorbed where nothing is remembered.
    assert dslc("graph", TINY, "--after", "absorb").status == 1
