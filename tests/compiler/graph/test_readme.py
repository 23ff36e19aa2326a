"""The invariants that README.md lists are held by the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

import compiler.graph
from tests.compiler.graph.test_verify import MUTATED, REPLACED

README = (Path(compiler.graph.__path__[0]) / "README.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent


def test_every_test_that_is_named_exists() -> None:
    files = [*HERE.glob("test_*.py"), *HERE.parent.glob("passes/test_*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", README))
    assert named
    for name in named:
        assert f"def {name}(" in code


def test_every_case_that_is_named_exists() -> None:
    cases = {*REPLACED, *(mutate.__name__ for mutate in MUTATED)}
    named = re.findall(r"is_refused\[([^\]]*)\]", README)
    assert named
    for case in ", ".join(named).split(", "):
        assert case == ".." or case in cases


def test_every_invariant_names_a_test() -> None:
    invariants = re.split(r"^\d+\. ", README.split("## ")[1], flags=re.MULTILINE)[1:]
    assert len(invariants) == 13
    assert all("`test_" in text for text in invariants)
