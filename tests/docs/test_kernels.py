"""docs/kernels.md: its families are those of the code, its paths and links lead somewhere."""

from __future__ import annotations

from backends.triton.package import FAMILIES, LIBRARIES
from tests.support.documents import tables
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_every_family_is_in_the_table() -> None:
    listed = [row[0].strip("`") for row in tables(TEXT, "file")]
    names = [family.__name__.rpartition(".")[2] for family in FAMILIES]
    assert listed == [f"{name}.py" for name in names]


def test_every_library_is_in_the_table() -> None:
    listed = [row[0].strip("`") for row in tables(TEXT, "library file")]
    assert listed == [f"{library.name}.py" for library in LIBRARIES]
