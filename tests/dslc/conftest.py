"""Running commands in this process: as the shell would, but in milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.places import ROOT


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A spec with two mistakes: an unknown key and a wrong type."""
    path = tmp_path / "wrong.yaml"
    tiny = (ROOT / "specs" / "deepseek_v3_tiny.yaml").read_text(encoding="utf-8")
    path.write_text(tiny + "\nprecison: {policy: bf16}\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8").replace("params:\n", "params:\n  odd_one: [1, 2]\n", 1)
    path.write_text(text, encoding="utf-8")
    return path
