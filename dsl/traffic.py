"""Traffic files: from a name on the command line to the requests that a model is planned for."""

from __future__ import annotations

from pathlib import Path

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.read import read_source
from dsl.schema import Traffic, read_validated
from dsl.suggest import did_you_mean
from specs import TRAFFIC


def read_traffic(name: str) -> Traffic:
    """Of a path that ends in .yaml, or a bare name of those shipped.

    Raises `DiagnosticError`: E121 for an unknown name, and those of reading and validating a file.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        known = sorted(file.stem for file in TRAFFIC.glob("*.yaml"))
        if name not in known:
            help = did_you_mean(name, known)
            help = help or f"known are {', '.join(known)}; a path ends in .yaml"
            message = f"there is no traffic `{name}` among those shipped"
            raise DiagnosticError([Diagnostic("E121", message, help=help)])
        path, name = TRAFFIC / f"{name}.yaml", f"specs/traffic/{name}.yaml"
    return read_validated(Traffic, read_source(path, name), "a traffic file")
