"""docs/tutorial.md: a newcomer who types what it says gets what it shows."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import commands, examples, sections
from tests.support.places import ROOT

DOCS = ROOT / "docs"
TEXT = (DOCS / "tutorial.md").read_text(encoding="utf-8")
CHECKER = doctest.OutputChecker()


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
    seen = 0
    for example in examples(TEXT):
        if example.name:
            (tmp_path / example.name).write_text(example.text, encoding="utf-8")
        for command, expected in commands(example):
            seen += 1
            run = ["sh", "-e", "-c", f"exec 2>&1; {command}"]
            done = subprocess.run(
                run, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            differs = command.startswith("dslc diff")
            assert done.returncode == differs, done.stdout
            same = CHECKER.check_output(expected, done.stdout, doctest.ELLIPSIS)
            assert same, f"$ {command}\nprints\n{done.stdout}\nexpected is\n{expected}"
    assert seen >= 12


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        file = DOCS / (path or "tutorial.md")
        assert file.exists(), target
        assert not anchor or anchor in sections(file.read_text(encoding="utf-8")), target
