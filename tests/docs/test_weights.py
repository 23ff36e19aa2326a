"""docs/weights.md: its commands run, its numbers and JSON are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backends.weights import BESIDE, FP8
from tests.support.command import Run
from tests.support.documents import examples
from tests.support.places import ROOT, TEXT
from tests.support.trained import built, part

TEXT_OF_IT = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_commands_run_one_after_another(dslc: Run, tmp_path: Path) -> None:
    package = built(tmp_path, "docs_weights_tiny", train__steps="2", train__ema="0.5")
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes()[:3000])
    words = ["--out", str(tmp_path / "runs" / "tiny"), "--data", str(tmp_path / "text.txt")]
    assert part(package, "command").main(package.Model, words) == 0
    (console,) = (one.text for one in examples(TEXT_OF_IT) if one.language == "console")
    commands = re.findall(r"^\$ dslc (.*?)(?: +#.*)?$", console, re.M)
    assert len(commands) == 5
    for command in commands:
        outcome = dslc(*command.split())
        assert outcome.status == 0, outcome.err
    audit, config = (json.loads(one.text) for one in examples(TEXT_OF_IT) if one.language == "json")
    assert config == FP8
    rows = json.loads((tmp_path / "published" / "audit.json").read_text())["tensors"]
    (row,) = (one for one in rows if one["name"] == audit["name"])
    for part_of in (*audit["read"], *audit["written"], *row["read"], *row["written"]):
        del part_of["sha256"]
    assert row == audit
    assert len(list((tmp_path / "small_files").glob("*.safetensors"))) > 2


def test_files_that_are_copied_are_listed() -> None:
    assert all(f"`{name}`" in TEXT_OF_IT for name in BESIDE)
