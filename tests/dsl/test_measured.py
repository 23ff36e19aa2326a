"""Calibrations: the shipped one, with a source for each number, and mistakes in others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsl.diagnostic import DiagnosticError, render
from dsl.load import load
from dsl.measured import calibration_of
from specs import CLUSTERS
from tests.support.golden import Golden
from tests.support.places import TINY

SHIPPED = sorted(CLUSTERS.glob("*.measured.yaml"))
SETS = ["parallel={cluster: h800_2048, batch: 15360, sequence_length: 64}"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_number_has_its_source(path: Path) -> None:
    """Behind it, or, of a product, in the comment above its group."""
    above = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("- {"):
            assert re.search(r"# .{10}", above), line
            continue
        if re.search(r":\s+\d", line):
            assert re.search(r"# .{10}", line), line
        above = line


def test_a_calibration_lies_beside_its_cluster_file() -> None:
    found = calibration_of(load(TINY, sets=SETS), None)
    assert found is not None and found[1] == "specs/clusters/h800_2048.measured.yaml"
    assert found[0].calibration == "h800_2048"
    other = [SETS[0].replace("h800_2048", "h100_8")]
    assert calibration_of(load(TINY, sets=other), None) is None


def test_mistakes_have_their_place(tmp_path: Path, golden: Golden) -> None:
    lines = [
        "calibration: h800_2048",
        "products:",
        "  - {dtype: fp4, m: 1, n: 1, k: 1, microseconds: 1}",
        "  - {dtype: fp8, m: 0, n: 1, k: 1}",
        "attention: {forward: fast}",
        "dispatch: {bandwith: 1GB}",
    ]
    found = []
    texts = ("\n".join(lines) + "\n", "calibration: other\n", "- 1\n")
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.measured.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DiagnosticError) as raised:
            calibration_of(load(TINY, sets=SETS), str(path))
        found.append(render(raised.value.diagnostics).replace(str(tmp_path), ""))
    golden("errors/calibration.txt", "\n".join(found))
    with pytest.raises(DiagnosticError, match="cannot read"):
        calibration_of(load(TINY, sets=SETS), str(tmp_path / "none.yaml"))
