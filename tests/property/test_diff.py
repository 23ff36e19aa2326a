"""The difference of random models: none with itself, and mirrored the other way round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.pipeline import compile
from dsl.load import Description
from dslc.difference import Side, difference
from tests.property.random_specs import accepted, fitted, specs


def side(spec: dict[str, Any], name: str) -> Side | None:
    def made(description: Description) -> Side:
        compiled = compile(description)
        return Side(name, description.resolved(), compiled.lowered, compiled.programs, None)

    with tempfile.TemporaryDirectory() as folder:
        return accepted(spec, Path(folder), name, made)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
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
