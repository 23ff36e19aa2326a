"""Cluster files: those shipped, with a source for each number, and those of a user."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsl.diagnostic import DiagnosticError
from dsl.load import load
from specs import CLUSTERS
from tests.support.places import TINY

SHIPPED = sorted(path for path in CLUSTERS.glob("*.yaml") if "." not in path.stem)


def sets(cluster: str | Path) -> list[str]:
    return [f"parallel={{cluster: {cluster}, batch: 64, sequence_length: 64}}"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_clusters_are_named_as_their_files(path: Path) -> None:
    description = load(TINY, sets=sets(path.stem))
    assert description.cluster is not None and description.cluster.cluster == path.stem
    assert description.sources[-1].name == f"specs/clusters/{path.name}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_number_of_hardware_has_its_source_beside_it(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s*(memory\w*|bf16|fp8|inside|across):", line):
            assert re.search(r"# .{10}", line), line


def test_a_cluster_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cluster: mine\nnodes: 3\ngpus_per_node: 4\nmemory: 24GiB\n", encoding="utf-8")
    cluster = load(TINY, sets=sets(path)).cluster
    assert cluster is not None
    assert (cluster.ranks, cluster.memory) == (12, 24 * 2**30)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("cluster: c\nnodes: 0\ngpus_per_node: 1\nmemroy: 1\n", ["E300", "E303"]),
        ("- 1\n", ["E302"]),
        ("cluster: c\nnodes: 1\n", ["E301"]),
        ("cluster: c\nnodes: 1\ngpus_per_node: 1\nflops: {fp4: 1}\n", ["E300"]),
    ],
)
def test_mistakes_have_their_place_in_the_cluster_file(
    tmp_path: Path, text: str, codes: list[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DiagnosticError) as raised:
        load(TINY, sets=sets(path))
    found = raised.value.diagnostics
    assert sorted(d.code for d in found) == codes
    assert all(d.span is not None and d.span.source.name == str(path) for d in found)
