"""What people read when a model does not fit together: one small spec or block for each mistake."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from compiler.lower import lower
from dsl.diagnostic import Diagnostic, DiagnosticError, render
from dsl.load import load
from dslc.commands.explain import catalog
from tests.support.golden import Golden
from tests.support.places import GOLDEN

FOLDER = GOLDEN / "lower_errors"
CASES = sorted({path.stem for path in FOLDER.glob("*.*") if path.suffix in (".yaml", ".dsl")})
LOWER = Path(__file__).parents[3] / "compiler" / "lower"


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are called by their names alone, as by somebody who works there."""
    monkeypatch.chdir(FOLDER)


@cache
def diagnose(case: str) -> list[Diagnostic]:
    """`case`.yaml as it is, or the valid spec with the block Example or Root of `case`.dsl."""
    block = Path(f"{case}.dsl")
    try:
        if Path(f"{case}.yaml").exists():
            lower(load(f"{case}.yaml"))
        else:
            sets = [f"blocks=[causal_lm, decoder, gqa, swiglu, ./valid.dsl, ./{block}]"]
            if "block Root(" in block.read_text():
                sets.append("architecture.block=Root")
            else:
                sets[0] = sets[0].replace("./valid.dsl, ", "")
            lower(load("valid.yaml", sets=sets))
    except DiagnosticError as error:
        return error.diagnostics
    return []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_explained(case: str, golden: Golden) -> None:
    found = diagnose(case)
    golden(f"lower_errors/{case}.txt", render(found))
    codes = {diagnostic.code for diagnostic in found}
    if case == "valid":
        assert not found
    elif case.startswith("E"):
        assert codes == {case[:4]}, "one mistake, and no others that follow from it"
    else:
        assert len(codes) > 2, "mistakes of several kinds are shown at once"


@pytest.mark.parametrize("case", [case for case in CASES if case != "valid"])
def test_a_message_has_a_place_and_a_reason(case: str) -> None:
    for diagnostic in diagnose(case):
        span = diagnostic.span
        assert span is not None and span.text.strip(), "the caret stands under something"
        assert diagnostic.label and diagnostic.message
        # What does not meet is named in full; everything else says what to write instead.
        assert diagnostic.help or diagnostic.related or diagnostic.code in ("E410", "E411")


def test_every_code_of_the_lowering_is_shown_and_explained() -> None:
    used = {
        code
        for path in LOWER.rglob("*.py")
        for code in re.findall(r'"(E\d{3})"', path.read_text(encoding="utf-8"))
    }
    assert len(used) > 30
    shown = {d.code for case in CASES for d in diagnose(case)}
    assert used == shown
    assert used <= set(catalog())
