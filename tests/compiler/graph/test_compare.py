"""Two programs side by side: nothing is lost, nothing is told twice, and what moved is no loss."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.graph.compare import Comparison, Mark, compare, compare_graphs, lines_of
from compiler.graph.core import Boundary, Derivative, Program, copy_program
from compiler.graph.parse import parse_program
from dsl.source import Source
from tests.support.strategies import programs


def program(*graphs: str) -> Program:
    return parse_program(Source("p.graph", "program @p root @Main\n" + "\n".join(graphs)))


def graph(body: str, name: str = "Main") -> str:
    return f"graph @{name}(%x: f32[batch, seq, n=4]) -> (y: f32[batch, seq, n=4]) {{\n{body}\n}}\n"


T = ": f32[batch, seq, n=4]"


def marks(block: Comparison) -> dict[str, str]:
    return {line.key: line.mark.value for line in block.lines if line.mark is not Mark.SAME}


@pytest.mark.slow
@settings(max_examples=15)
@given(programs())
def test_a_program_does_not_differ_from_itself(one: Program) -> None:
    for block in compare(one, copy_program(one)):
        assert block.mark is Mark.SAME and not block.counts()


@pytest.mark.slow
@settings(max_examples=15)
@given(programs(), programs(), st.booleans())
def test_both_programs_can_be_read_from_the_comparison(a: Program, b: Program, same: bool) -> None:
    if same and a.root != b.root:  # otherwise the two have hardly a block in common
        b.graphs[a.root] = b.graphs.pop(b.root)
    for block in compare(a, b):
        after = [line.text for line in block.lines if line.mark is not Mark.REMOVED]
        assert after == ([x.text for x in lines_of(block.after)] if block.after else [])
        kept = [x for x in block.lines if x.mark is not Mark.ADDED]
        # A line that came from another block was not here before.
        here = [x for x in kept if x.mark is not Mark.MOVED or not x.was]
        before = [x.was if x.mark is Mark.CHANGED else x.text for x in here]
        expected = [x.text for x in lines_of(block.before)] if block.before else []
        assert sorted(before) == sorted(expected)


@pytest.mark.slow
@settings(max_examples=15)
@given(programs(), programs())
def test_the_other_way_round_added_is_removed(a: Program, b: Program) -> None:
    def told(before: Program, after: Program, mirrored: bool) -> dict[str, Counter[Mark]]:
        swap = {Mark.ADDED: Mark.REMOVED, Mark.REMOVED: Mark.ADDED} if mirrored else {}
        found = {}
        for block in compare(before, after):
            name = block.before.name if mirrored and block.before else block.name
            pairs = compare_graphs(block.before, block.after)
            found[name] = Counter({swap.get(m, m): n for m, n in pairs.counts().items()})
        return found

    assert told(a, b, False) == told(b, a, True)


def test_lines_are_known_by_what_they_define() -> None:
    a = program(graph(f"%a = silu(%x) {T}\n%b = sigmoid(%a) {T}\nreturn(%b)"))
    b = program(
        graph(f"%n = scale(%x) <by=2.0> {T}\n%a = silu(%n) {T}\n%b = sigmoid(%a) {T}\nreturn(%b)")
    )
    (block,) = compare(a, b)
    assert marks(block) == {"%n": "added", "%a": "changed"}
    assert next(x for x in block.lines if x.key == "%a").was == f"%a = silu(%x) {T}"


def test_an_operator_that_stands_elsewhere_has_moved() -> None:
    a = program(graph(f"%a = silu(%x) {T}\n%b = sigmoid(%x) {T}\n%c = add(%a, %b) {T}\nreturn(%c)"))
    b = program(graph(f"%b = sigmoid(%x) {T}\n%a = silu(%x) {T}\n%c = add(%a, %b) {T}\nreturn(%c)"))
    (block,) = compare(a, b)
    assert list(marks(block).values()) == ["moved"]


def test_an_operator_may_move_to_another_block() -> None:
    called = f"%y = call(%x) <callee=Inner, scope=inner> {T}\nreturn(%y)"
    a = program(graph(f"%a = silu(%x) {T}\nreturn(%a)", "Inner"), graph(called))
    b = program(
        graph("return(%x)", "Inner"),
        graph(f"%s = silu(%x) {T}\n%y = call(%s) <callee=Inner, scope=inner> {T}\nreturn(%y)"),
    )
    inner, main = compare(a, b)
    assert marks(inner) == {"%a": "removed", "return ": "changed"}
    assert marks(main) == {"%s": "moved", "%y": "changed"}
    assert next(x for x in main.lines if x.key == "%s").was == "Inner"
    assert next(x for x in inner.lines if x.key == "%a").was == "Main"


def test_blocks_that_differ_in_their_numbers_are_the_same_block() -> None:
    body = f"%a = silu(%x) {T}\nreturn(%a)"
    call = f"%y = call(%x) <callee=Inner_%d, scope=inner> {T}\nreturn(%y)"
    a = program(graph(body, "Inner_12"), graph(call.replace("%d", "12")))
    b = program(graph(body, "Inner_34"), graph(call.replace("%d", "34")))
    inner, main = compare(a, b)
    assert (inner.name, inner.mark, marks(main)) == ("Inner_34", Mark.SAME, {"%y": "changed"})
    assert inner.before is not None and inner.before.name == "Inner_12"


def test_the_graphs_of_gradients_belong_to_a_block() -> None:
    a, b = (program(graph("return(%x)")) for _ in range(2))
    b.derivatives["Main"] = Derivative("Main_backward", results=(0,))
    assert marks(compare(a, b)[0]) == {"derivative": "added"}
    assert marks(compare(b, a)[0]) == {"derivative": "removed"}


def test_the_boundary_belongs_to_the_outermost_block() -> None:
    a, b = (program(graph("return(%x)")) for _ in range(2))
    a.boundary, b.boundary = Boundary(("x",)), Boundary(("x",), ("y",))
    assert marks(compare(a, b)[0]) == {"boundary": "changed"}


def test_blocks_come_and_go() -> None:
    one, two = graph("return(%x)"), graph("return(%x)", "Other")
    (main, other) = compare(program(one), program(one, two))
    assert (main.mark, other.mark) == (Mark.SAME, Mark.ADDED)
    (main, other) = compare(program(one, two), program(one))
    assert (main.mark, other.mark, other.after) == (Mark.SAME, Mark.REMOVED, None)
    assert {x.mark for x in other.lines} == {Mark.REMOVED}
