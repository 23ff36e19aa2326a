"""Cluster files: from the name in a spec to the hardware that it means."""

from __future__ import annotations

import os.path
from pathlib import Path

from dsl import yaml
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.read import read_source
from dsl.schema import Cluster, read_validated
from dsl.source import Source
from dsl.suggest import did_you_mean
from specs import CLUSTERS


def read_cluster(named: yaml.Scalar) -> tuple[Cluster, Source]:
    """The cluster that `named` means: a bare name of those shipped, or a path that ends in .yaml.

    Raises `DiagnosticError`: E119 for an unknown name, and those of reading and validating a file.
    """
    path, name = cluster_file(named)
    source = read_source(path, name, named.span)
    return read_validated(Cluster, source, "a cluster file"), source


def cluster_file(named: yaml.Scalar) -> tuple[Path, str]:
    """The file of a cluster, and its name in messages. Raises `DiagnosticError` (E119)."""
    name, source = named.value, named.span.source
    if "/" in name or name.endswith(".yaml"):
        # A path is relative to the file that names it, or to the current folder for `--set`.
        base = source.path.parent if source.path else Path()
        shown = os.path.join(os.path.dirname(source.name), name)
        return base / name, os.path.normpath(shown)
    known = sorted(file.stem for file in CLUSTERS.glob("*.yaml") if "." not in file.stem)
    if name not in known:
        help = did_you_mean(name, known) or f"known are {', '.join(known)}; a path ends in .yaml"
        message = f"there is no cluster `{name}` among those shipped"
        raise DiagnosticError([Diagnostic("E119", message, named.span, "unknown", help=help)])
    return CLUSTERS / f"{name}.yaml", f"specs/clusters/{name}.yaml"
