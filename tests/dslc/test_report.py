"""How problems reach people and tools."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.source import Source
from dslc import report
from tests.support.command import Run

PLAIN = """\
error[E303]: depth below 0: -1
 --> a.yaml:1:8
  |
1 | depth: -1
  |        ^^ here
  = help: raise it
"""


def problem() -> Diagnostic:
    source = Source("a.yaml", "depth: -1\n")
    return Diagnostic("E303", "depth below 0: -1", source.span(7, 9), "here", help="raise it")


def test_text_goes_to_standard_error_without_color_when_nobody_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report.print_problems([problem()])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", PLAIN)


def test_color_changes_no_letter() -> None:
    colored = report.colored(PLAIN)
    assert report.RED + "error[E303]" in colored
    assert f"{report.RED}       ^^ here{report.RESET}" in colored
    assert re.sub(r"\033\[[\d;]*m", "", colored) == PLAIN


@pytest.mark.parametrize(
    ("environment", "colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_color_is_for_terminals_unless_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], colored: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert report.use_color() is colored


def test_every_problem_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_problems([problem(), Diagnostic("E690", "no room")])
    assert capsys.readouterr().err.endswith("error[E690]: no room\n\n2 problems\n")


def test_json_goes_to_standard_output(dslc: Run, wrong: Path) -> None:
    outcome = dslc("check", wrong, "--format", "json")
    assert outcome.status == 1 and not outcome.err
    found = json.loads(outcome.out)
    assert found["ok"] is False
    places = [(d["code"], d["file"], d["line"], d["column"]) for d in found["diagnostics"]]
    assert len(places) == 2
    text = wrong.read_text(encoding="utf-8").splitlines()
    lines = [text[line - 1][column - 1 :] for _, file, line, column in places if file == str(wrong)]
    assert lines[0].startswith("[1, 2]") and lines[1].startswith("precison")


def test_files_that_cannot_be_read_are_the_users_to_mend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(report.typer.Exit) as stop, report.reporting():
        Path("/nowhere/at/all").read_text(encoding="utf-8")
    assert stop.value.exit_code == 1
    assert capsys.readouterr().err == "error[E690]: /nowhere/at/all: No such file or directory\n"


@pytest.mark.parametrize(("rank", "waited"), [(None, []), ("0", []), ("3", [5.0])])
def test_the_first_rank_of_a_machine_tells_before_others(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, waited: list[float]
) -> None:
    """torchrun ends the others once the first has told, and ended."""
    waits: list[float] = []
    monkeypatch.setattr("dslc.report.time.sleep", waits.append)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(report.typer.Exit), report.reporting():
        raise DiagnosticError([problem()])
    assert waits == waited


def test_other_faults_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), report.reporting():
        _ = 1 / 0
    with pytest.raises(report.typer.Exit), report.reporting():
        raise DiagnosticError([problem()])
