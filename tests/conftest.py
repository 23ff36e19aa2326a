"""Fixtures of every test: golden files, commands; property tests run the same way each time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dslc.cli import main
from tests.support.command import Outcome, Run
from tests.support.golden import Golden, GoldenFiles

# Triton interprets or compiles, for the whole of a process: tests interpret kernels, on the CPU,
# and compile them in processes of their own. It must be said before anything imports Triton.
os.environ["TRITON_INTERPRET"] = "1"
# Tests run beside each other (`pytest -n auto`), and products as small as theirs gain nothing from
# more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A red build must be red again on the next run: examples follow from the test, not from chance.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile("default")


# Folders whose tests interpret kernels, run random models or those of transformers, or train.
SLOW = {"kernels", "oracle", "property", "train"}

FILES = pytest.StashKey[GoldenFiles]()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(relative_path, text)` compares `text` with tests/golden/<relative_path>."""
    return request.config.stash[FILES].compare


@pytest.fixture
def dslc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """`dslc("check", spec)` runs in an empty folder; its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSLC_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["dslc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FILES] = GoldenFiles(update=config.getoption("--update-golden"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW & {*item.path.parts}:
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker of `pytest -n` compared."""
    node.config.stash[FILES].add(node.workeroutput["golden"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden"] = session.config.stash[FILES].report()
    elif whole_suite_passed(session) and session.config.stash[FILES].unused():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files = terminalreporter.config.stash[FILES]
    for change in files.changes:
        terminalreporter.section("golden file rewritten")
        terminalreporter.write(change)
    session = terminalreporter._session
    if session is not None and whole_suite_passed(session):
        for path in files.unused():
            message = f"FAILED tests/golden/{path}: no test reads it; remove it"
            terminalreporter.write_line(message, red=True)


def whole_suite_passed(session: pytest.Session) -> bool:
    """Whether every test of the suite ran, so that a file that none of them read is unused.

    A skipped test counts as run: what is skipped (no browser, a GPU) compares no golden file.
    """
    config = session.config
    reporter = config.pluginmanager.getplugin("terminalreporter")
    incomplete = ("failed", "error", "deselected")
    return (
        config.args_source == pytest.Config.ArgsSource.TESTPATHS
        and reporter is not None
        and session.testscollected > 0
        and not config.option.collectonly
        # With workers, nobody tells this process what a selection left out.
        and not config.option.markexpr
        and not config.option.keyword
        and not any(reporter.stats.get(outcome) for outcome in incomplete)
    )
