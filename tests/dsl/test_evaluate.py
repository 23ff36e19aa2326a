"""Values of expressions. Rendered messages are in test_diagnostic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl import ast
from dsl.diagnostic import DiagnosticError, Diagnostics, render
from dsl.evaluate import Constant, evaluate, evaluate_params, free_names
from dsl.parse import parse_expression
from dsl.source import Source
from dsl.yaml import Mapping, parse_yaml

NAMES: dict[str, Constant] = {"hidden_size": 7168, "n_group": 8, "zero": 0, "on": True, "word": "a"}


@pytest.mark.parametrize(
    "text", ["7168", "0", "1_000", "2.5", "14.8T", "80GiB", "1e-4", "hidden_size", "in_", "f32"]
)
def test_an_atom_is_what_the_grammar_makes_of_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("a.yaml", f"key: {text}")
    alone = parse_expression(source, 5, len(source.text))
    monkeypatch.setattr("dsl.parse._atom", lambda span: None)
    assert repr(alone) == repr(parse_expression(source, 5, len(source.text)))


@pytest.mark.parametrize("text", ["not", "4.", "1__0", "4 Q", "5Q", "07x", "1e9999"])
def test_what_is_no_atom_is_refused_by_the_grammar(text: str) -> None:
    source = Source("a.yaml", f"key: {text}")
    with pytest.raises(DiagnosticError):
        parse_expression(source, 5, len(source.text))


def parse(text: str) -> ast.Expr:
    # The expression does not begin its source, as in a spec.
    source = Source("a.yaml", f"key: {text}")
    return parse_expression(source, 5, len(source.text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7168", 7168),
        ("14.8T + 1", 14_800_000_000_001),
        ("hidden_size * 18 // 7", 18432),
        ("hidden_size / 2", 3584.0),
        ("7 % 4 - -2", 5),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("2 ** -1", 0.5),
        ("(1 + 2) * 3", 9),
        ("min(3, n_group, 5)", 3),
        ("max(3)", 3),
        ("abs(-2.5)", 2.5),
        ("round(2.6)", 3),
        ("floor(7 / 2)", 3),
        ("ceil(7 / 2)", 4),
        ("sqrt(16)", 4.0),
        ("log(exp(2))", 2.0),
        ("n_group > 1 and hidden_size % n_group == 0", True),
        ("zero != 0 and 1 // zero > 0", False),
        ("zero == 0 or 1 // zero > 0", True),
        ("1 // zero if zero != 0 else 5", 5),
        ("not on", False),
        ("word == 'a'", True),
        ("on == true", True),
        ("1 == 1.0", True),
        ('"text"', "text"),
        ("0.5 ** 1e9", 0.0),
    ],
)
def test_value(text: str, value: Constant) -> None:
    result = evaluate(parse(text), NAMES)
    assert result == pytest.approx(value) if isinstance(value, float) else result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "code", "marked"),
    [
        ("n_grup + 1", "E310", "n_grup"),
        ("1 if on else missing", "E310", "missing"),
        ("3 + 1 // zero", "E312", "1 // zero"),
        ("5 % zero", "E312", "5 % zero"),
        ("zero ** -1", "E312", "zero ** -1"),
        ("log(zero)", "E312", "log(zero)"),
        ("n_group + on", "E313", "on"),
        ("-word", "E313", "word"),
        ("word < 3", "E313", "word"),
        ("not zero", "E313", "zero"),
        ("1 if hidden_size else 2", "E313", "hidden_size"),
        ("on == 1", "E313", "on == 1"),
        ("min(1, word)", "E313", "word"),
        ("2 ** 10 ** 9", "E314", "2 ** 10 ** 9"),
        ("10 ** 30 * 10 ** 30", "E314", "10 ** 30 * 10 ** 30"),
        ("exp(1e9)", "E314", "exp(1e9)"),
        ("1e30 ** 1e30", "E314", "1e30 ** 1e30"),
        ("maxx(1)", "E315", "maxx"),
        ("sqrt(1, 2)", "E315", "sqrt(1, 2)"),
        ("min()", "E315", "min()"),
        ("min(a=1)", "E315", "a"),
        ("model.norm", "E316", "model.norm"),
    ],
)
def test_refused(text: str, code: str, marked: str) -> None:
    with pytest.raises(DiagnosticError) as raised:
        evaluate(parse(text), NAMES)
    [problem] = raised.value.diagnostics
    assert problem.span is not None
    assert (problem.code, problem.span.text) == (code, marked)


def test_all_unknown_names_are_reported() -> None:
    with pytest.raises(DiagnosticError) as raised:
        evaluate(parse("first + second * min(third, n_group)"), NAMES)
    assert [d.span.text for d in raised.value.diagnostics if d.span] == ["first", "second", "third"]


def test_free_names_in_reading_order() -> None:
    expr = parse("a + f(b, x=-c) if d and not e else g ** 2")
    assert [name.value for name in free_names(expr)] == ["a", "b", "c", "d", "e", "g"]


def params(text: str) -> tuple[dict[str, Constant], list[str]]:
    node = parse_yaml(Source("a.yaml", text))
    assert isinstance(node, Mapping)
    problems = Diagnostics()
    values = evaluate_params(node.entries, problems)
    return {name: v.value for name, v in values.items()}, [d.message for d in problems]


@pytest.mark.parametrize("text", ["192", "-1", "4K", "1e-6", "true", "width // 2", "min(1, 2)"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_quoted_values_that_are_no_text_are_refused_where_they_are(quote: str, text: str) -> None:
    values, found = params(f"width: 64\nodd: {quote}{text}{quote}\nafter: odd + 1")
    assert values == {"width": 64}
    assert found == [f'the parameter `odd` is the text "{text}"']


@pytest.mark.parametrize("text", ["wide", "pre-norm", "top2_sum", "", "a b", "((", "width", "null"])
def test_other_quoted_values_are_text(text: str) -> None:
    assert params(f'width: 64\nword: "{text}"') == ({"width": 64, "word": text}, [])


def test_parameters_use_each_other_in_any_order() -> None:
    values, problems = params('c: a * b\na: b + 1\nb: 3\nt: "a"\nf: c > 3\nbig: 1.5K')
    assert values == {"c": 12, "a": 4, "b": 3, "t": "a", "f": True, "big": 1500}
    assert list(values) == ["c", "a", "b", "t", "f", "big"]
    assert not problems


def test_only_the_first_cause_is_reported() -> None:
    values, problems = params("a: 1 // 0\nb: a + 1\nc: b + missing\nd: 4\ne: [d]\nf: e")
    assert values == {"d": 4}
    assert problems == [
        "division by zero",
        "unknown name `missing`",
        "the parameter `e` is a list",
    ]


def test_every_cycle_is_reported_with_its_path() -> None:
    values, problems = params("a: b\nb: c + unknown\nc: a\nd: d\ne: a\nf: 1")
    assert values == {"f": 1}
    assert problems == [
        "these parameters need each other: a -> b -> c -> a",
        "unknown name `unknown`",
        "these parameters need each other: d -> d",
    ]


@pytest.mark.slow
def test_a_long_chain_of_parameters() -> None:
    lines = [f"p{i}: p{i - 1} + 1" for i in range(2999, 0, -1)]
    values, problems = params("\n".join([*lines, "p0: 0"]))
    assert values["p2999"] == 2999
    assert not problems


expression_like = st.lists(
    st.sampled_from(
        [
            "1", "0", "2.5", "1e9", "4K", "9e30", "x", "on", "word", "true", "(", ")", "+",
            "-", "*", "/", "//", "%", "**", "==", "!=", "<", ">=", "and", "or", "not", "if",
            "else", "min(", "sqrt(", "log(", "exp(", "round(", "floor(", "f(", ",", "=", ".",
            "'a'", '"b"', "{", "}", "k",
        ]
    ),
    max_size=14,
).map(" ".join)  # fmt: skip


@given(expression_like | st.text(max_size=20))
def test_any_expression_has_a_value_or_is_explained(text: str) -> None:
    try:
        value = evaluate(parse(text), {"x": 3, "on": True, "word": "a"})
    except DiagnosticError as error:
        assert error.diagnostics
        render(error.diagnostics)
    else:
        assert isinstance(value, bool | int | str | float)
        assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("depth", [10, 50, 100, 150, 200])
@pytest.mark.parametrize("part", ["-", "not ", "1+", "2**", "1 if true else "])
def test_deep_expressions_never_exhaust_the_stack(part: str, depth: int) -> None:
    try:
        evaluate(parse(part * depth + "true"), {})
    except DiagnosticError as error:
        assert {d.code for d in error.diagnostics} <= {"E203", "E204", "E313", "E314"}
