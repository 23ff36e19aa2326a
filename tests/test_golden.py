"""The fixture `golden`: it fails on a difference, rewrites on request, and notices leftovers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

pytestmark = pytest.mark.slow  # processes
SUITE = """
def test_text(golden):
    golden("folder/a.txt", "one\\ntwo\\n")
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A project of one golden test whose file does not exist yet."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copytree(ROOT / "tests" / "support", tmp_path / "tests" / "support")
    (tmp_path / "tests" / "test_a.py").write_text(SUITE, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest]\ntestpaths = ["tests"]\n')
    return tmp_path


def run(suite: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "xdist"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=suite, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_a_difference_fails_with_a_diff_until_it_is_accepted(suite: Path) -> None:
    status, out = run(suite)
    assert status == 1 and "golden/folder/a.txt does not exist yet" in out
    file = suite / "tests" / "golden" / "folder" / "a.txt"
    assert not file.exists()
    assert run(suite, "--update-golden")[0] == 0
    assert file.read_bytes() == b"one\ntwo\n"
    assert run(suite)[0] == 0
    file.write_bytes(b"one\r\ntwo\n")
    status, out = run(suite)
    assert status == 1 and "golden/folder/a.txt differs" in out
    status, out = run(suite, "--update-golden")
    assert status == 0 and "golden file rewritten" in out and "+one\n" in out


def test_a_file_that_no_test_reads_fails_the_whole_suite_only(suite: Path) -> None:
    run(suite, "--update-golden")
    folder = suite / "tests" / "golden" / "folder"
    (folder / "a.yaml").write_text("the input of a.txt", encoding="utf-8")
    assert run(suite)[0] == 0
    (folder / "b.txt").write_text("left over", encoding="utf-8")
    status, out = run(suite)
    assert status == 1 and "tests/golden/folder/b.txt: no test reads it" in out
    assert run(suite, "tests/test_a.py")[0] == 0


def test_workers_say_what_they_compared(suite: Path) -> None:
    assert "golden file rewritten" in run(suite, "--update-golden", "-n", "2")[1]
    assert run(suite, "-n", "2")[0] == 0
    (suite / "tests" / "golden" / "b.txt").write_text("left over", encoding="utf-8")
    status, out = run(suite, "-n", "2")
    assert status == 1 and "tests/golden/b.txt: no test reads it" in out
