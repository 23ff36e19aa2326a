"""The README tells the truth: its files are made, its commands run, and print what it says."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import Run
from tests.support.documents import commands, examples
from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKER = doctest.OutputChecker()


def test_files_and_commands_in_the_order_of_the_text(dslc: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    seen = 0
    for example in examples(README):
        if example.name:
            (tmp_path / example.name).write_text(example.text, encoding="utf-8")
        for command, expected in commands(example):
            seen += 1
            printed = output(dslc, command)
            same = CHECKER.check_output(expected, printed, doctest.ELLIPSIS)
            assert same, f"$ {command}\nprints\n{printed}\nand the README says\n{expected}"
    assert seen >= 6


def output(dslc: Run, command: str) -> str:
    program, *arguments = shlex.split(command)
    if program == "dslc":
        outcome = dslc(*arguments)
        return outcome.out + outcome.err
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_every_target_and_file_that_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake (\w+)", README)
    assert "build" in targets and "test" in targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((\S+?)\)", README))
