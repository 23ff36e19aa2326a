"""Calibrations: from a file, or from the one next to a cluster file, to measured rates."""

from __future__ import annotations

from pathlib import Path

from dsl import yaml
from dsl.cluster import cluster_file
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description
from dsl.read import read_source
from dsl.schema import Calibration, read_validated

SUFFIX = ".measured.yaml"
"""How the name of a calibration ends; before it is that of the cluster file."""


def read_calibration(path: Path, name: str, cluster: str) -> Calibration:
    """Of a file, `name` being its name in messages.

    Raises `DiagnosticError`: E535 if it is of another cluster than `cluster`, and those of reading
    and validating a file.
    """
    source = read_source(path, name)
    found = read_validated(Calibration, source, "a calibration")
    if found.calibration != cluster:
        root = yaml.parse_yaml(source)
        assert isinstance(root, yaml.Mapping)
        message = f"a calibration of {found.calibration}, but the cluster is {cluster}"
        span = root.entries["calibration"].node.span
        help = "`dslc calibrate SPEC` on that cluster makes one; or plan with --cluster"
        raise DiagnosticError([Diagnostic("E535", message, span, "another cluster", help=help)])
    return found


def calibration_of(description: Description, given: str | None) -> tuple[Calibration, str] | None:
    """The calibration in the file `given`, or in the one next to the cluster file; and its name.

    None where there is none. Raises `DiagnosticError`.
    """
    assert description.cluster is not None
    cluster = description.cluster.cluster
    if given is not None:
        return read_calibration(Path(given), given, cluster), given
    section = yaml.child_of(description.composed.root, "parallel")
    named = yaml.child_of(section, "cluster") if isinstance(section, yaml.Mapping) else None
    if not isinstance(named, yaml.Scalar):
        return None
    path, shown = cluster_file(named)
    found = path.with_name(path.name.removesuffix(".yaml") + SUFFIX)
    if not found.is_file():
        return None
    shown = shown.removesuffix(".yaml") + SUFFIX
    return read_calibration(found, shown, cluster), shown
