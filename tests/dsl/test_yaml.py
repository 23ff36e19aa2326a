"""YAML trees, their spans, and what is refused. Rendered messages are in test_diagnostic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.diagnostic import DiagnosticError, render
from dsl.source import Source
from dsl.yaml import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    Mapping,
    Node,
    Scalar,
    Sequence,
    child_of,
    key_span,
    nearest_node,
    parse_yaml,
)


def read(text: str) -> Node:
    return parse_yaml(Source("a.yaml", text))


def plain(node: Node) -> object:
    """Values and source texts, for comparison."""
    if isinstance(node, Mapping):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return (node.value, node.span.text)


def test_values_are_text_and_spans_are_exact() -> None:
    text = (
        "é: {größe: 7168, b: [1, foo + bar]}\n"
        "\"q r\": 'it''s'\n"
        "list:\n- yes\n-   0x1 # note\n\n"
        "end: ~\n"
    )
    node = read(text)
    assert plain(node) == {
        "é": {"größe": ("7168", "7168"), "b": [("1", "1"), ("foo + bar", "foo + bar")]},
        "q r": ("it's", "'it''s'"),
        "list": [("yes", "yes"), ("0x1", "0x1")],
        "end": ("~", "~"),
    }
    assert key_span(node, ("q r",)).text == '"q r"'  # type: ignore[union-attr]
    assert nearest_node(node, ("é",)).span.text == "{größe: 7168, b: [1, foo + bar]}"
    assert nearest_node(node, ("list",)).span.text == "- yes\n-   0x1"
    assert nearest_node(node, ("é", "b", 1)).span.location == "a.yaml:1:25"
    assert node.span.text == text.rstrip()


@pytest.mark.parametrize(
    ("text", "value", "quoted", "content"),
    [
        ("plain text", "plain text", False, "plain text"),
        ('"two words"', "two words", True, "two words"),
        ("'two words'", "two words", True, "two words"),
        ('""', "", True, ""),
        ('"a\\tb"', "a\tb", True, None),
        ("'it''s'", "it's", True, None),
        ("|\n  a\n  b\n", "a\nb\n", True, None),
        (">-\n  a\n  b\n", "a b", True, None),
        ("a\n  b", "a b", False, None),
    ],
)
def test_scalars(text: str, value: str, quoted: bool, content: str | None) -> None:
    node = child_of(read(f"key: {text}"), "key")
    assert isinstance(node, Scalar)
    assert (node.value, node.quoted) == (value, quoted)
    assert (node.content.text if node.content else None) == content


@pytest.mark.parametrize("text", ["a:\nb: 1", "a: # note\n\nb: 1", "{a: , b: 1}", "a:"])
def test_a_missing_value_is_placed_behind_its_colon(text: str) -> None:
    node = child_of(read(text), "a")
    assert isinstance(node, Scalar) and not node.value
    assert node.span.start == node.span.end == text.index(":") + 1


def test_reading_from_an_offset_keeps_the_places_of_the_source() -> None:
    source = Source("--set", "params.x={a: [1, 2]}")
    node = parse_yaml(source, 9)
    assert plain(node) == {"a": [("1", "1"), ("2", "2")]}
    assert nearest_node(node, ("a", 1)).span.location == "--set:1:18"


def test_lookup_ends_where_the_tree_does() -> None:
    node = read("a: [{b: 1}]")
    assert nearest_node(node, ("a", 0, "c", "d")).span.text == "{b: 1}"
    assert nearest_node(node, ("a", 7)).span.text == "[{b: 1}]"
    assert child_of(node, "b") is None
    assert key_span(node, ("a", 0, "b")).text == "b"  # type: ignore[union-attr]
    assert key_span(node, ("a", 0, "c")) is None


def test_depth_limit() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    read(nested(MAX_DEPTH + 1))
    with pytest.raises(DiagnosticError) as raised:
        read(nested(MAX_DEPTH + 2))
    assert [d.code for d in raised.value.diagnostics] == ["E107"]


def test_size_limit() -> None:
    read("#" + "x" * (MAX_CHARACTERS - 3) + "\na")
    with pytest.raises(DiagnosticError) as raised:
        read("#" + "x" * MAX_CHARACTERS)
    assert [d.code for d in raised.value.diagnostics] == ["E102"]


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("a: 1\n\n  \na: 2", "E104", "a.yaml:4:1"),
        ("a: [1, {b: 1, b: 2}]", "E104", "a.yaml:1:15"),
        ("größe: &x 1", "E105", "a.yaml:1:8"),
        ("a: !foo 1", "E105", "a.yaml:1:4"),
        ("a: ! 1", "E105", "a.yaml:1:4"),
        ("- &x [1]", "E105", "a.yaml:1:3"),
        ("%YAML 1.1\n---\na: 1", "E105", "a.yaml:1:1"),
        ("a: 1\x00", "E109", "a.yaml:1:5"),
        ('a: "\\x00"', "E109", "a.yaml:1:4"),
        ('a: "\\ud800"', "E109", "a.yaml:1:4"),
        ('a: "\\UFFFFFFFF"', "E103", "a.yaml:1:2"),
        ("a:\n\tb: 1", "E108", "a.yaml:2:1"),
        ("a: 1\n...\nb", "E110", "a.yaml:3:1"),
        ("", "E111", "a.yaml:1:1"),
        ("---", "E111", "a.yaml:1:1"),
        ("a: @x", "E103", "a.yaml:1:4"),
        ("a: b: c", "E103", "a.yaml:1:5"),
        ("a: }", "E103", "a.yaml:1:4"),
        ("a: - b", "E103", "a.yaml:1:4"),
        ('a: "\\q"', "E103", "a.yaml:1:6"),
        ("word\nb: 1", "E103", "a.yaml:2:2"),
    ],
)
def test_refused(text: str, code: str, place: str) -> None:
    with pytest.raises(DiagnosticError) as raised:
        read(text)
    [problem] = raised.value.diagnostics
    assert problem.span is not None
    assert (problem.code, problem.span.location) == (code, place)


def test_all_recoverable_problems_are_reported_with_a_syntax_error_after_them() -> None:
    with pytest.raises(DiagnosticError) as raised:
        read("a: &x 1\na: 2\nb: [")
    assert [d.code for d in raised.value.diagnostics] == ["E105", "E104", "E103"]


yaml_like = st.text(
    st.sampled_from("ab1 :-?,[]{}#&*!|>'\"%@`\\\n\t\r.~<=x0Uu\u2028é\x85\ufeff"), max_size=40
)


@given(yaml_like | st.text(max_size=40))
def test_any_text_is_read_or_explained(text: str) -> None:
    try:
        check_spans(read(text), len(text))
    except DiagnosticError as error:
        assert error.diagnostics
        render(error.diagnostics)


def check_spans(node: Node, length: int) -> None:
    assert 0 <= node.span.start <= node.span.end <= length
    if isinstance(node, Mapping):
        for key, entry in node.entries.items():
            assert (
                key == entry.key_span.text or not key.isalnum() or entry.key_span.text[0] in "'\">|"
            )
            check_spans(entry.node, length)
    elif isinstance(node, Sequence):
        for item in node.items:
            check_spans(item, length)
    elif not node.quoted and node.value.isalnum():
        assert node.span.text == node.value
