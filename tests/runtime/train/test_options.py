"""The options of training: both command lines take the same ones, with the same checks."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from dslc.commands import train
from runtime.train.options import FIXED, Options, declared, parse

GIVEN = {
    "out": ["run"],
    "data": ["a.txt", "b.jsonl"],
    "weights": ["published"],
    "tokenizer": ["bytes"],
    "held_out": ["0.5"],
    "seed": ["3"],
    "save_every": ["7"],
    "keep": ["8"],
    "eval_every": ["9"],
    "eval_sequences": ["10"],
    "device": ["cpu"],
}
WORDS = [
    word for name, texts in GIVEN.items() for text in texts
    for word in (f"--{name.replace('_', '-')}", text)
]  # fmt: skip


def test_every_option_is_declared_with_its_default_in_the_help() -> None:
    assert [one.name for one in declared(Options)] == [one.name for one in fields(Options)]
    for one in declared(Options):
        default = FIXED.get(one.name) or getattr(Options, one.name, None)
        if isinstance(default, int | float):
            assert f"[{default}]" in one.option.help


def test_both_command_lines_take_every_option() -> None:
    expected = parse(Options, "train", "", WORDS)
    assert expected.data == (Path("a.txt"), Path("b.jsonl"))
    assert all(getattr(expected, name) != getattr(Options, name, None) for name in GIVEN)
    assert (
        parse(Options, "train", "", ["--out", "run", "--data", "a.txt", "b.jsonl"]).data
        == expected.data
    )

    taken: dict[str, object] = {}

    def run(**given: object) -> None:
        taken.update(given)

    run.__signature__ = inspect.signature(train.run)  # type: ignore[attr-defined]
    app = typer.Typer()
    app.command()(run)
    app(["deepseek_v3_tiny", *WORDS], standalone_mode=False)
    for name in GIVEN:
        value = taken[name]
        assert (tuple(value) if isinstance(value, list) else value) == getattr(expected, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "must be at least 1"),
        (["--held-out", "1"], "must be at most 0.999"),
        (["--held-out", "nan"], "must be at least 0"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_values_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, "train", "", ["--out", "run", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
