"""Offsets to lines and columns."""

from dsl.source import Source


def test_positions_count_characters_from_one() -> None:
    source = Source("a.yaml", "é: x\n\nb")
    assert [source.position(i) for i in range(8)] == [
        (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 1), (3, 1), (3, 2),
    ]  # fmt: skip
    assert [source.line(n) for n in (1, 2, 3)] == ["é: x", "", "b"]


def test_spans_know_their_text_and_place() -> None:
    source = Source("specs/a.yaml", "ab\ncd ef")
    span = source.span(3, 5)
    assert (span.text, span.line, span.column) == ("cd", 2, 1)
    assert span.location == "specs/a.yaml:2:1"
    assert span.to(source.span(6, 8)).text == "cd ef"


def test_sources_of_equal_text_stay_apart() -> None:
    assert Source("a", "x") != Source("a", "x")
    assert Source("a", "x").span(0, 1) != Source("a", "x").span(0, 1)
