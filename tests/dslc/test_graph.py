"""`dslc graph`: the graph in every format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compiler.graph.parse import parse_program
from compiler.pipeline import PIPELINES
from dsl.source import Source
from dslc.specs import shipped
from tests.support.command import Run

TINY = shipped()["deepseek_v3_tiny"]
V3 = shipped()["deepseek_v3"]


@pytest.mark.slow
@pytest.mark.parametrize("program", [*PIPELINES, "draft_2"])
def test_text_parses_back(dslc: Run, program: str) -> None:
    out = dslc("graph", TINY, "--program", program).out
    parsed = parse_program(Source("out.graph", out))
    assert parsed.root == "CausalLM" and "MLA" in parsed.graphs


@pytest.mark.slow
def test_one_block(dslc: Run) -> None:
    out = dslc("graph", TINY, "--block", "MLA").out
    assert "@MLA(" in out and "@CausalLM(" not in out and "rms_norm(" in out


@pytest.mark.slow
def test_json_names_the_operators(dslc: Run) -> None:
    text = dslc("graph", TINY, "--block", "MLA", "--format", "json").out
    assert json.loads(text) and '"attention"' in text


@pytest.mark.slow
def test_pictures(dslc: Run) -> None:
    dot = dslc("graph", TINY, "--block", "MLA", "--format", "dot").out
    assert dot.startswith("digraph") and "q_a_proj" in dot
    svg = dslc("graph", TINY, "--block", "MLA", "--format", "svg").out
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "q_a_proj" in svg


@pytest.mark.slow
def test_a_page_of_all_passes(dslc: Run) -> None:
    outcome = dslc("graph", TINY, "--html", "--program", "decode", "--after", "absorb")
    assert re.fullmatch(r"wrote deepseek_v3_tiny\.html: [\d,]+ KB\n", outcome.out)
    text = Path("deepseek_v3_tiny.html").read_text(encoding="utf-8")
    at = [one.name for one in PIPELINES["decode"]].index("absorb") + 1
    assert f'data-start="decode-{at}"' in text and text.count("<script>") == 1
    assert dslc("graph", TINY, "--html", "--block", "MLA").status == 0  # its own page again
    last = f'data-start="forward-{len(PIPELINES["forward"])}/MLA"'
    assert last in Path("deepseek_v3_tiny.html").read_text("utf-8")
    assert "did you mean `MLA`?" in dslc("graph", TINY, "--html", "--block", "MLAA").err


@pytest.mark.slow
def test_the_program_of_a_stage_says_where_tensors_lie(dslc: Run) -> None:
    stage = ("--program", "train", "--stage", "3")
    out = dslc("graph", V3, *stage, "--block", "DeepSeekMoE").out
    assert "stack=4, axis=expert" in out and "dispatch(" in out and "bf16[batch@(" in out
    assert "dispatch(" not in dslc("graph", V3, *stage, "--after", "cut_stages").out
    page = dslc("graph", V3, *stage, "--html", "--after", "partition")
    assert page.status == 0
    text = Path("deepseek_v3.html").read_text(encoding="utf-8")
    assert re.search(r'data-start="train_stage_3-\d+"', text) and "is spread over the ranks" in text
    assert len(text.encode()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "help"), [(V3, "its stages are 0 to 15"), (TINY, "no section `parallel`")]
)
def test_a_stage_that_the_model_does_not_have(dslc: Run, spec: Path, help: str) -> None:
    outcome = dslc("graph", spec, "--stage", "16")
    assert (outcome.status, outcome.out) == (1, "")
    assert "the model has no stage 16" in outcome.err and help in outcome.err


@pytest.mark.slow
def test_a_page_replaces_no_file_of_others(dslc: Run) -> None:
    Path("thesis.html").write_text("precious", encoding="utf-8")
    outcome = dslc("graph", TINY, "--html", "-o", "thesis.html")
    assert outcome.status == 1 and "error[E692]: thesis.html exists" in outcome.err
    assert Path("thesis.html").read_text(encoding="utf-8") == "precious"
    assert dslc("graph", TINY, "-o", "v3.txt").status == 2
    assert not Path("v3.txt").exists()


@pytest.mark.slow
def test_the_nearest_block_and_program_are_offered(dslc: Run) -> None:
    outcome = dslc("graph", TINY, "--block", "MLAA")
    assert outcome.status == 1
    assert "the model has no block 'MLAA'" in outcome.err
    assert "did you mean `MLA`?" in outcome.err
    assert "did you mean `decode`?" in dslc("graph", TINY, "--program", "decod").err
    assert "no program 'draft_3'" in dslc("graph", TINY, "--program", "draft_3").err


def test_help_names_every_program(dslc: Run) -> None:
    assert ", ".join(PIPELINES) in " ".join(dslc("graph", "--help").out.split())
