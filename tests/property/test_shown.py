"""Random models as people see them: their difference, and the page of their passes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.report.steps import render_steps
from compiler.pipeline import compile
from dsl.load import Description
from dslc.difference import Side, difference
from tests.support.random_specs import accepted, fitted, specs


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(specs().map(fitted))
def test_the_page_of_any_model_holds_all_of_its_steps(spec: dict[str, Any]) -> None:
    def made(description: Description) -> tuple[str, int]:
        compiled = compile(description)
        steps = sum(len(compiled.steps_of(program)) for program in compiled.programs)
        return render_steps(description, compiled, version="0", start="train-0"), steps

    with tempfile.TemporaryDirectory() as folder:
        found = accepted(spec, Path(folder), "model", made)
    if found is not None:
        text, steps = found
        assert text.count('<article class="step"') == steps


def side(spec: dict[str, Any], name: str) -> Side | None:
    def made(description: Description) -> Side:
        compiled = compile(description)
        return Side(name, description.resolved(), compiled.lowered, compiled.programs, None)

    with tempfile.TemporaryDirectory() as folder:
        return accepted(spec, Path(folder), name, made)


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_of_two_random_models(data: st.DataObject) -> None:
    a, b = (side(data.draw(specs().map(fitted)), name) for name in ("a", "b"))
    if a is None or b is None:
        return
    for one in (a, b):
        assert difference(one, one).equal
    there, back = difference(a, b), difference(b, a)
    assert not there.equal  # the names of the two models differ at least
    assert {(v.path, v.a, v.b) for v in there.values} == {(v.path, v.b, v.a) for v in back.values}
    assert {(n.name, n.a, n.b) for n in there.numbers} == {(n.name, n.b, n.a) for n in back.numbers}
