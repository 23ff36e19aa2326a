"""docs/training.md: its paths exist, its commands are those of the parser, its specs build."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.command import Run
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.removeprefix("$ "), comments=True)
    for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_those_that_there_are(dslc: Run, words: list[str], tmp_path: Path) -> None:
    """Their options are known, and what they train can be built."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        if words[0] != "dslc":  # the same options, by the package itself
            words = ["dslc", "train", words[0].removesuffix(".train"), *words[1:]]
    program, command, *arguments = words
    assert program == "dslc"
    known = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", dslc(command, "--help").out))
    assert {word for word in arguments if word.startswith("-")} <= known
    if command == "train":
        sets = [w for pair in pairwise(arguments) if pair[0] == "--set" for w in pair]
        outcome = dslc("build", arguments[0], *sets, "-o", tmp_path / "built")
        assert outcome.status == 0, outcome.err
