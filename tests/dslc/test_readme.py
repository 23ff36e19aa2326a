"""The README tells the truth: its files are made, its commands run, and print what it says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.command import Run, typed
from tests.support.documents import follow
from tests.support.places import ROOT, SPECS


@pytest.mark.slow
def test_files_and_commands_in_the_order_of_the_text(dslc: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "specs").symlink_to(SPECS)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert follow(text, tmp_path, partial(typed, dslc)) >= 6
