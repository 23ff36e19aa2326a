"""Study files: factors and levels become configurations; mistakes have their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsl.diagnostic import DiagnosticError
from dsl.study import Study, read_study

HEAD = "study: s\nspec: deepseek_v3_tiny\ndata: [a.txt]\n"


def study(folder: Path, text: str) -> Study:
    path = folder / "study.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    return read_study(path)


def codes(folder: Path, text: str) -> list[tuple[str, int]]:
    """Code and line of each diagnostic."""
    with pytest.raises(DiagnosticError) as raised:
        study(folder, text)
    return [(one.code, one.span.line if one.span else 0) for one in raised.value.diagnostics]


FACTORS = """factors:
  mtp: {with: {}, without: {architecture.mtp.depth: 0}}
  train.bias_update: [0.01, 0.001, 0]
"""


def test_each_level_alone_against_the_baseline(tmp_path: Path) -> None:
    found = study(tmp_path, FACTORS).configurations
    assert [one.name for one in found] == [
        "baseline", "mtp=without", "bias_update=0.001", "bias_update=0",
    ]  # fmt: skip
    assert found[0].changes == {"train.bias_update": "0.01"}
    assert found[1].changes == {"architecture.mtp.depth": "0", "train.bias_update": "0.01"}
    assert found[2].levels == {"train.bias_update": "0.001"}


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    found = study(tmp_path, FACTORS + "design: grid\n").configurations
    assert len(found) == len({one.name for one in found}) == 6
    assert found[0].name == "baseline"
    assert "mtp=without, bias_update=0" in [one.name for one in found]


def test_listed_runs_come_after_the_baseline(tmp_path: Path) -> None:
    listed = "runs:\n  - {mtp: without, train.bias_update: 0}\n"
    found = study(tmp_path, FACTORS + listed).configurations
    assert [one.name for one in found] == ["baseline", "mtp=without, bias_update=0"]


def test_variants_of_the_spec_are_levels(tmp_path: Path) -> None:
    found = study(tmp_path, "factors: {variant: [none, small]}\n").configurations
    assert [one.variant for one in found] == [None, "small"]


def test_values_of_every_run_yield_to_those_of_a_level(tmp_path: Path) -> None:
    text = "set: {train.tokens: 5K, train.batch: 4}\nfactors: {train.batch: [4, 8]}\n"
    assert study(tmp_path, text).configurations[1].changes == {
        "train.tokens": "5K", "train.batch": "8",
    }  # fmt: skip


def test_values_keep_their_form_on_one_line(tmp_path: Path) -> None:
    text = (
        "factors:\n  train.learning_rate:\n    - 3e-4\n"
        "    - - {until: 300K, start: 0, value: 3e-3}\n      - {value: 1e-4}\n"
    )
    found = study(tmp_path, text).configurations[1]
    assert found.changes["train.learning_rate"] == (
        "[{until: 300K, start: 0, value: 3e-3}, {value: 1e-4}]"
    )
    assert found.spec_text("base.yaml") == (
        'extends: "base.yaml"\nset:\n'
        "  train.learning_rate: [{until: 300K, start: 0, value: 3e-3}, {value: 1e-4}]\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("factors: {train.batch: [4]}\n", [("E303", 4)]),
        ("factors: {train.batch: [4, 4]}\n", [("E303", 4)]),
        ("factors: {train.batch: 4}\n", [("E302", 4)]),
        ("factors: {}\n", [("E302", 4)]),
        ("factors: {a: [1, 2]}\ndesign: gird\n", [("E305", 5)]),
        ("factors: {a: [1, 2]}\nseeds: [0, 0]\n", [("E303", 5)]),
        ("factors: {a: [1, 2]}\nseed: [0]\n", [("E300", 5)]),
        ("factors: {a: [1, 2]}\nruns:\n  - {b: 1}\n  - {a: 3}\n", [("E300", 6), ("E305", 7)]),
        ("factors: {a: [1, 2]}\nbudget: {hold: parameters}\n", [("E301", 5)]),
        ("factors: {a: [1, 2]}\nbudget: {solve: params.x}\n", [("E301", 5)]),
        ("set: 3\nfactors: {a: [1, 2]}\n", [("E302", 4)]),
    ],
)
def test_mistakes_have_their_place(
    tmp_path: Path, text: str, expected: list[tuple[str, int]]
) -> None:
    assert codes(tmp_path, text) == expected


def test_a_study_without_factors_says_what_is_missing(tmp_path: Path) -> None:
    assert codes(tmp_path, "seeds: [1]\n") == [("E301", 1)]
