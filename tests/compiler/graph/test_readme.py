"""The invariants that README.md lists are held by the tests that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import compiler.graph

README = (Path(compiler.graph.__path__[0]) / "README.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent


def test_every_test_that_is_named_exists() -> None:
    files = [*HERE.glob("test_*.py"), *HERE.parent.glob("passes/test_*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", README))
    assert named
    for name in named:
        assert f"def {name}(" in code


def keys(name: str) -> set[str]:
    """Of a dictionary of test_verify.py: texts, and names of functions."""
    for node in ast.parse((HERE / "test_verify.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(target) == name:
                return {str(ast.unparse(key)).strip("'") for key in node.value.keys if key}
    raise AssertionError(f"test_verify.py has no dictionary {name}")


def test_every_case_that_is_named_exists() -> None:
    cases = keys("REPLACED") | keys("MUTATED")
    named = re.findall(r"is_refused\[([^\]]*)\]", README)
    assert named
    for case in ", ".join(named).split(", "):
        assert case == ".." or case in cases


def test_every_invariant_names_a_test() -> None:
    invariants = re.split(r"^\d+\. ", README.split("## ")[1], flags=re.MULTILINE)[1:]
    assert len(invariants) == 13
    assert all("`test_" in text for text in invariants)
