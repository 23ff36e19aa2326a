"""Random programs survive printing and reading, and no text makes reader or verifier fall over."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.graph.core import Program
from compiler.graph.names import NamePart, PublishedName, clashes, parts_of
from compiler.graph.parse import parse_program
from compiler.graph.text import print_program
from compiler.graph.verify import verify
from compiler.ops import OPS, fused, gradient
from compiler.ops.pointwise import POINTWISE
from dsl.diagnostic import DiagnosticError, render
from dsl.source import Source
from tests.support.differences import equal, first_difference
from tests.support.places import GOLDEN
from tests.support.strategies import programs

# What only passes make; tests/compiler/passes reads such programs back.
MADE_BY_PASSES = {
    *(
        k
        for k, operator in OPS.items()
        if operator.__module__ in (gradient.__name__, fused.__name__)
    ),
    *(
        "swiglu",
        "gate",
        "add_rms_norm",
        "linear_cross_entropy",
        "repeat_backward",
        "save",
        "saved",
        "accumulate_grad",
    ),
    *("gradient", "sum_squares", "update", "assign", "quantize_weight"),
}
# They name a file of the user's; tests/backends/test_extern.py reads such programs back.
EXTERN = {"extern", "sequence_extern", "extern_grad"}
# Equal but for their names: not all of them are drawn each time.
FUNCTIONS = {function.kind for function in POINTWISE}


@pytest.mark.slow
def test_random_programs_are_valid_and_read_back_equal() -> None:
    seen: set[str] = set()

    @settings(max_examples=100)
    @given(programs(), st.booleans())
    def one(program: Program, locs: bool) -> None:
        verify(program)
        text = print_program(program, locs)
        again = parse_program(Source("random.graph", text))
        assert first_difference(program, again) is None
        assert print_program(again, locs) == text
        verify(again)
        seen.update(op.kind for graph in program.graphs.values() for op in graph.walk())

    one()
    assert seen | MADE_BY_PASSES | EXTERN | FUNCTIONS == set(OPS)
    assert seen & FUNCTIONS


def read(text: str) -> Program | None:
    """The program, or None with a diagnostic that can be shown. Anything else is a failure."""
    try:
        program = parse_program(Source("any.graph", text))
    except DiagnosticError as error:
        assert render(error.diagnostics).startswith("error[E50")
        return None
    try:
        verify(program)
    except DiagnosticError as error:
        assert render(error.diagnostics).startswith("error[E51")
    return program


@given(st.text())
def test_any_text_is_read_or_explained(text: str) -> None:
    read(text)


TINY = (GOLDEN / "graph" / "deepseek_v3_tiny.txt").read_text(encoding="utf-8")
WORDS = sorted({*re.findall(r"[%@]?[\w.*+=]+", TINY), *'()<>{}[]|,:=@%-"\n'})


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data())
def test_a_changed_text_is_read_or_explained(data: st.DataObject) -> None:
    """A few cuts and words of the graph in places where they do not belong."""
    text = TINY
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        word = data.draw(st.sampled_from(WORDS) | st.text(max_size=3))
        text = text[:start] + word + text[start + length :]
    program = read(text)
    if program is not None:
        assert equal(program, parse_program(Source("again.graph", print_program(program))))


parts: st.SearchStrategy[NamePart] = st.sampled_from("ab") | st.tuples(
    st.integers(0, 3), st.integers(0, 3)
).map(lambda pair: (min(pair), max(pair)))
names = st.builds(PublishedName, st.lists(parts, min_size=1, max_size=4).map(tuple))


def written_out(name: PublishedName) -> set[tuple[str, ...]]:
    """Every name that a name with ranges stands for."""
    found: set[tuple[str, ...]] = {()}
    for part in name.parts:
        words = [part] if isinstance(part, str) else map(str, range(part[0], part[1] + 1))
        words = list(words)
        found = {(*begin, word) for begin in found for word in words}
    return found


@given(st.lists(names, max_size=6))
def test_names_clash_where_those_written_out_do(listed: list[PublishedName]) -> None:
    expected = {
        frozenset((i, j))
        for i, a in enumerate(listed)
        for j, b in enumerate(listed)
        if i != j and any(y[: len(x)] == x for x in written_out(a) for y in written_out(b))
    }
    at = {id(name): i for i, name in enumerate(listed)}
    assert {frozenset((at[id(a)], at[id(b)])) for a, b in clashes(listed)} == expected


def test_numbers_in_names_are_layers() -> None:
    assert parts_of("a.*.3.*", ((0, 2), (5, 6))) == ("a", (0, 2), (3, 3), (5, 6))
    assert parts_of("a.03.*") == ("a", "03", "*")
    assert str(PublishedName(parts_of("a.*.3", ((0, 2),)))) == "a.0..2.3"
