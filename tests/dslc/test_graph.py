"""`dslc graph`: the graph in every format."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from compiler.graph.text import parse_program
from compiler.pipeline import PIPELINES
from dsl.source import Source
from dslc.specs import shipped
from tests.dslc.conftest import Run

TINY = shipped()["deepseek_v3_tiny"]


@pytest.mark.parametrize("program", PIPELINES)
def test_text_parses_back(dslc: Run, program: str) -> None:
    out = dslc("graph", TINY, "--program", program).out
    parsed = parse_program(Source("out.graph", out))
    assert parsed.root == "CausalLM" and "MLA" in parsed.graphs


def test_one_block(dslc: Run) -> None:
    out = dslc("graph", TINY, "--block", "MLA").out
    assert "@MLA(" in out and "@CausalLM(" not in out and "rms_norm(" in out


def test_json_names_the_operators(dslc: Run) -> None:
    text = dslc("graph", TINY, "--block", "MLA", "--format", "json").out
    assert json.loads(text) and '"attention"' in text


def test_pictures(dslc: Run) -> None:
    dot = dslc("graph", TINY, "--block", "MLA", "--format", "dot").out
    assert dot.startswith("digraph") and "q_a_proj" in dot
    svg = dslc("graph", TINY, "--block", "MLA", "--format", "svg").out
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "q_a_proj" in svg


def test_the_nearest_block_and_program_are_offered(dslc: Run) -> None:
    outcome = dslc("graph", TINY, "--block", "MLAA")
    assert outcome.status == 1
    assert "the model has no block 'MLAA'" in outcome.err
    assert "did you mean `MLA`?" in outcome.err
    assert "did you mean `decode`?" in dslc("graph", TINY, "--program", "decod").err


def test_help_names_every_program(dslc: Run) -> None:
    assert ", ".join(PIPELINES) in " ".join(dslc("graph", "--help").out.split())
