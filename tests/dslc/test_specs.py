"""Which file a command's SPEC means."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsl.diagnostic import DiagnosticError
from dslc.specs import find, shipped
from tests.support.command import Run


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_shipped_name_works_from_anywhere_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert find("deepseek_v3") == shipped()["deepseek_v3"]
    assert "using the shipped" in capsys.readouterr().err


def test_a_file_comes_before_a_shipped_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("deepseek_v3").write_text("model: mine\n", encoding="utf-8")
    assert find("deepseek_v3") == Path("deepseek_v3")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("modle.yaml", "model.yaml"),
        ("deepsek_v3", "deepseek_v3"),
        ("deepseek_v3.yml", "deepseek_v3"),
        ("specs/deepseek_v3.yaml", "deepseek_v3"),
    ],
)
def test_the_nearest_spec_is_offered(asked: str, meant: str) -> None:
    Path("model.yaml").write_text("model: x\n", encoding="utf-8")
    with pytest.raises(DiagnosticError) as error:
        find(asked)
    (problem,) = error.value.diagnostics
    assert problem.help == f"did you mean `{meant}`?"


def test_a_stranger_is_told_how_to_begin(dslc: Run) -> None:
    outcome = dslc("check", "zzzzzzzz")
    assert outcome.status == 1 and "there is no spec 'zzzzzzzz'" in outcome.err
    assert "dslc init" in outcome.err


def test_a_folder_is_no_spec(dslc: Run, tmp_path: Path) -> None:
    outcome = dslc("check", tmp_path)
    assert outcome.status == 1 and "folder" in outcome.err
