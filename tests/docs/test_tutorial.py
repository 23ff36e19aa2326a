"""docs/tutorial.md: a newcomer who types what it says gets what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import follow
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a shell at the root of the repository, where `dslc` and `python` are those of the test."""
    for shared in ("specs", "data"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in {"dslc": "-m dslc", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_files_and_commands_in_the_order_of_the_text(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    def run(command: str) -> str:
        line = ["sh", "-e", "-c", f"exec 2>&1; {command}"]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert done.returncode == command.startswith("dslc diff"), done.stdout
        return done.stdout

    assert follow(TEXT, tmp_path, run) >= 12
