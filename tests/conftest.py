"""Fixtures of every test: golden files, and property tests that run the same way each time."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Triton interprets or compiles, for the whole of a process: tests interpret kernels, on the CPU,
# and compile them in processes of their own. It must be said before anything imports Triton.
os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"
Golden = Callable[[str, str], None]

# A red build must be red again on the next run: examples follow from the test, not from chance.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile("default")


class GoldenFiles:
    """What the run compared, so that a golden file that no test reads any more is noticed."""

    def __init__(self, update: bool) -> None:
        self.update = update
        self.used: set[Path] = set()
        self.changes: list[str] = []

    def compare(self, relative_path: str, text: str) -> None:
        path = GOLDEN / relative_path
        self.used.add(path)
        expected = path.read_bytes().decode() if path.exists() else None
        if expected == text:
            return
        difference = "".join(
            difflib.unified_diff(
                (expected or "").splitlines(keepends=True),
                text.splitlines(keepends=True),
                f"golden/{relative_path}",
                "this run",
            )
        )
        if not self.update:
            state = "differs" if expected is not None else "does not exist yet"
            pytest.fail(
                f"golden/{relative_path} {state}; if the new text is right, run "
                f"`pytest --update-golden`\n{difference or '(an empty text)'}",
                pytrace=False,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        self.changes.append(difference)

    def unused(self) -> list[str]:
        """Golden files that nothing read. `name.yaml` is the input of `name.txt`: same stem."""
        known = {path.with_suffix("") for path in self.used}
        files = [path for path in sorted(GOLDEN.rglob("*")) if path.is_file()]
        return [str(f.relative_to(GOLDEN)) for f in files if f.with_suffix("") not in known]


FILES = pytest.StashKey[GoldenFiles]()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(relative_path, text)` compares `text` with tests/golden/<relative_path>."""
    return request.config.stash[FILES].compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FILES] = GoldenFiles(update=config.getoption("--update-golden"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Every one of them holds a model of transformers against ours.
        if "oracle" in item.path.parts:
            item.add_marker("slow")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if whole_suite_passed(session) and session.config.stash[FILES].unused():
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
    """Whether every test of the suite ran, so that a file that none of them read is unused."""
    config = session.config
    reporter = config.pluginmanager.getplugin("terminalreporter")
    incomplete = ("failed", "error", "skipped", "deselected")
    return (
        config.args_source == pytest.Config.ArgsSource.TESTPATHS
        and reporter is not None
        and session.testscollected > 0
        and not config.option.collectonly
        and not any(reporter.stats.get(outcome) for outcome in incomplete)
    )
