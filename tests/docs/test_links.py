"""Every document: links and paths lead somewhere, its first lines say who it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import sections
from tests.support.places import ROOT

GUIDES = [path.relative_to(ROOT) for path in sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [Path("README.md"), Path("CONTRIBUTING.md"), *GUIDES]
FOLDERS = "backends|benchmarks|compiler|data|docs|dsl|dslc|runtime|specs|tests"


def text_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = text_of(document)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in sections(file.read_text(encoding="utf-8")), target
    for path in re.findall(rf"[`\s]((?:{FOLDERS})/[\w./]+\w)(?=[`\s])", text):
        # A word in capitals stands for a name.
        assert re.search(r"[A-Z]{2}", path) or (ROOT / path).exists(), path


def test_the_readme_names_every_guide_in_the_order_in_which_to_read() -> None:
    reading = text_of(Path("README.md")).split("## Read on")[1]
    listed = re.findall(r"\]\((\S+?)\)", reading)
    assert sorted(p for p in listed if p.startswith("docs/")) == [str(path) for path in GUIDES]
    assert listed[0] == "docs/tutorial.md"


@pytest.mark.parametrize("document", [*GUIDES, Path("CONTRIBUTING.md")], ids=str)
def test_a_guide_begins_with_who_it_is_for(document: Path) -> None:
    title, empty, first, *_ = text_of(document).split("\n")
    assert title.startswith("# ") and not empty
    assert first.startswith("For "), first


def test_targets_of_make_exist() -> None:
    makefile = text_of(Path("Makefile"))
    texts = map(text_of, DOCUMENTS)
    named = {t for text in texts for t in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M)}
    assert {"build", "check", "golden", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in named)
