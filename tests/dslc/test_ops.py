"""`dslc ops` says what blocks and graphs are made of; `dslc schema` what a spec may hold."""

from __future__ import annotations

import json

from compiler.lower.forms import FORMS
from compiler.ops import OPS
from tests.support.command import Run


def test_every_function_and_operator_has_one_line_that_says_something(dslc: Run) -> None:
    lines = [line for line in dslc("ops").out.splitlines() if line.startswith("  ")]
    told = dict(line.split(maxsplit=1) for line in lines)
    assert len(told) == len(lines)
    assert set(told) == {*FORMS, *OPS}
    assert all(len(text) > 8 for text in told.values())


def test_one_is_explained_as_blocks_write_it_and_as_graphs_print_it(dslc: Run) -> None:
    out = dslc("ops", "topk_groups").out
    assert "In a block: topk_groups(score, k = dim" in out
    assert "In a graph: topk_groups(score" in out
    assert all(attr in out for attr in OPS["topk_groups"].attrs)
    assert "In a block" not in dslc("ops", "repeat").out


def test_the_nearest_operator_is_offered(dslc: Run) -> None:
    outcome = dslc("ops", "topk_group")
    assert outcome.status == 1
    assert "there is no operator 'topk_group'" in outcome.err
    assert "did you mean `topk_groups`?" in outcome.err


def test_schema_is_json_that_knows_the_sections(dslc: Run) -> None:
    schema = json.loads(dslc("schema").out)
    assert {"model", "params", "architecture"} <= set(schema["properties"])
