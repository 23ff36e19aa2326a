"""Every code that dslc can print is explained, and every explanation is of such a code."""

from __future__ import annotations

import re

import pytest

from dslc.commands.explain import catalog
from dslc.commands.passes import about
from tests.support.command import Run
from tests.support.golden import Golden
from tests.support.models import GQA
from tests.support.places import ROOT


def test_the_catalog_and_the_source_name_the_same_codes() -> None:
    used = {
        code
        for folder in ("dsl", "compiler", "backends", "dslc")
        for path in (ROOT / folder).rglob("*.py")
        for code in re.findall(r'"(E\d{3})"', path.read_text(encoding="utf-8"))
    }
    assert len(used) > 20
    assert used == set(catalog())


def test_one_code_is_explained_at_length(dslc: Run) -> None:
    outcome = dslc("explain", "e405")
    assert outcome.status == 0
    title, text = catalog()["E405"]
    assert outcome.out == f"E405: {title}\n\n{text}\n"
    assert len(text) > 80


def test_all_codes_are_listed_in_order(dslc: Run) -> None:
    lines = dslc("explain").out.splitlines()
    assert [line[:4] for line in lines] == sorted(catalog())
    assert len(lines) == len(catalog())


def test_an_unknown_code_is_the_users_mistake(dslc: Run) -> None:
    outcome = dslc("explain", "E999")
    assert outcome.status == 1 and "there is no error or pass 'E999'" in outcome.err


@pytest.mark.slow
def test_a_pass_is_explained_with_what_it_did_and_why_it_did_nothing(
    dslc: Run, golden: Golden
) -> None:
    assert dslc("explain", "absorb").out == "\n".join(about("absorb")) + "\n"
    tiny = ROOT / "specs" / "deepseek_v3_tiny.yaml"
    sets = [part for one in GQA for part in ("--set", one)]
    texts = [
        dslc("explain", "absorb", tiny, "--at", "MLA").out,
        dslc("explain", "absorb", tiny, "--at", "GQA", *sets).out,
    ]
    golden("cli/explain_absorb.txt", "\n".join(texts))
    outcome = dslc("explain", "absorb", tiny, "--at", "MLAA")
    assert outcome.status == 1 and "did you mean `MLA`?" in outcome.err
