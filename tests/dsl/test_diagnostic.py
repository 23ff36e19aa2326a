"""Rendered diagnostics: one small spec for each kind of mistake, in tests/golden/errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dsl.diagnostic import (
    Diagnostic,
    DiagnosticError,
    Diagnostics,
    Label,
    printable,
    render,
    to_json,
)
from dsl.load import load
from dsl.source import Source

ERRORS = Path(__file__).parents[1] / "golden" / "errors"
CASES = sorted(path.stem for path in ERRORS.glob("E[123]*.yaml"))
DSL = Path(__file__).parents[2] / "dsl"


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_explained(
    case: str, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ERRORS)
    with pytest.raises(DiagnosticError) as raised:
        load(f"{case}.yaml")
    codes = {d.code for d in raised.value.diagnostics}
    assert case[:4] in codes
    golden(f"errors/{case}.txt", render(raised.value.diagnostics))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("E113_unknown_variant", {"variants": ["wid"]}),
        ("E120_variants", {"variants": ["flat", "wide", "deep"]}),
        ("E114_set_path", {"sets": ["params.hidden_size.x=1", "architecture.layers.x=1", "set=1"]}),
        ("E115_set_without_value", {"sets": ["params.hidden_size", "=3"]}),
        ("E302_set_of_wrong_kind", {"sets": ["architecture.layers.0.repeat={a: 1}", "params=3"]}),
        ("E300_set_unknown_key", {"sets": ["hidden_size=3", "sequence.max_position=4"]}),
        ("E103_set_not_yaml", {"sets": ["params.hidden_size=[1", "params.x="]}),
    ],
)
def test_mistake_on_the_command_line_is_explained(
    case: str,
    options: dict[str, object],
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ERRORS)
    with pytest.raises(DiagnosticError) as raised:
        load("valid.yaml", **options)  # type: ignore[arg-type]
    assert case[:4] in {d.code for d in raised.value.diagnostics}
    golden(f"errors/{case}.txt", render(raised.value.diagnostics))


def test_every_code_of_the_yaml_side_has_a_golden_file() -> None:
    files = ["compose", "evaluate", "load", "yaml", *map(str, DSL.glob("schema/*.py"))]
    used = set()
    for name in files:
        used |= set(re.findall(r'"(E[13]\d\d)"', (DSL / name).with_suffix(".py").read_text()))
    shown = set()
    for path in ERRORS.glob("*.txt"):
        shown |= set(re.findall(r"error\[(E\d+)\]", path.read_text()))
    # Sizes that no test file should have are tried in test_yaml and test_load instead.
    assert used - shown == {"E102"}
    assert len(used) > 25


def test_a_label_without_place_and_several_widths_render() -> None:
    source = Source("a.yaml", "x: 1\n" * 9 + "y: 2\n")
    late, early = source.span(45, 46), source.span(0, 1)
    text = render(
        [
            Diagnostic("E100", "no place"),
            Diagnostic("E101", "m", late, "l", (Label(early, "r"),), "h"),
        ]
    )
    assert text == (
        "error[E100]: no place\n"
        "\n"
        "error[E101]: m\n"
        "  --> a.yaml:10:1\n"
        "   |\n"
        "10 | y: 2\n"
        "   | ^ l\n"
        "  ::: a.yaml:1:1\n"
        "   |\n"
        " 1 | x: 1\n"
        "   | - r\n"
        "   = help: h\n"
    )


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\tb\u202e") == "a\\x1b[31m\tb\\x202e"
    source = Source("\x1b.yaml", "k: \x1b[0m")
    assert "\x1b" not in render([Diagnostic("E100", "\x1b", source.span(3, 7), "\x1b", (), "\x1b")])


@pytest.mark.parametrize(("at", "length"), [(0, 1), (200, 3), (3000, 5), (4990, 10), (10, 4000)])
def test_of_a_very_long_line_the_place_is_shown(at: int, length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(5000))
    span = Source("long.yaml", text).span(at, at + length)
    *_, line, marks = render([Diagnostic("E100", "m", span)]).splitlines()
    assert len(line) < 420 and len(marks) <= len(line)
    column = marks.index("^")
    assert line[column:][: marks.count("^")] == text[at:][: min(length, marks.count("^"))]
    assert marks.count("^") == length or length > 400


def test_json_holds_the_same_facts() -> None:
    source = Source("a.yaml", "é: 1\nb: 2\n")
    first = Label(source.span(0, 1), "first")
    [fact] = to_json([Diagnostic("E104", "twice", source.span(5, 6), "again", (first,), "mend")])
    assert json.loads(json.dumps(fact)) == {
        "code": "E104",
        "severity": "error",
        "message": "twice",
        "file": "a.yaml",
        "line": 2,
        "column": 1,
        "end_line": 2,
        "end_column": 2,
        "label": "again",
        "related": [
            {
                "file": "a.yaml",
                "line": 1,
                "column": 1,
                "end_line": 1,
                "end_column": 2,
                "text": "first",
            }
        ],
        "help": "mend",
    }
    assert to_json([Diagnostic("E100", "m")])[0]["file"] is None


def test_collected_diagnostics_are_sorted_and_kept_once() -> None:
    source = Source("a.yaml", "abc")
    problems = Diagnostics()
    problems.raise_if_any()
    problems.error("E102", "later", source.span(2, 3))
    problems.error("E103", "earlier", source.span(0, 1))
    problems.error("E102", "later", source.span(2, 3))
    problems.error("E101", "no place")
    assert len(problems) == 3
    assert [d.message for d in problems] == ["no place", "earlier", "later"]
    with pytest.raises(DiagnosticError, match="no place; earlier; later"):
        problems.raise_if_any()
