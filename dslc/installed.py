"""Packages that commands need, and the error where one is missing."""

from __future__ import annotations

import importlib.util

from dsl.diagnostic import Diagnostic, DiagnosticError


def require(what: str, *packages: str, by: str) -> None:
    """Raises `DiagnosticError` for packages that are not installed; `by` says how they are."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{what} needs {' and '.join(missing)}, not installed here"
        raise DiagnosticError(
            [Diagnostic("E605", message, help=f"{by}; `dslc build` needs neither")]
        )


def require_triton(what: str) -> None:
    """Raises `DiagnosticError` where kernels can neither be compiled nor run."""
    by = "`pip install torch==2.13.0`, then `pip install triton==3.7.1`"
    require(what, "torch", "triton", by=by)
