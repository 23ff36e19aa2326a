"""Load files: how many tokens the experts of each layer get, as a served model recorded it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.read import read_source

Load = Mapping[str, tuple[int, ...]]
"""By the name of a layer's block with experts, tokens of each expert, in any unit."""


def read_load(path: Path, experts: int) -> Load:
    """The loads of a file, of `experts` each. Raises `DiagnosticError`: E100, E101, E102, E122."""
    source = read_source(path, str(path))
    try:
        values = json.loads(source.text)
    except json.JSONDecodeError as error:
        span = source.span(error.pos, error.pos + 1)
        raise DiagnosticError([Diagnostic("E122", f"not valid JSON: {error.msg}", span)]) from None
    except (ValueError, RecursionError) as error:
        raise DiagnosticError([Diagnostic("E122", f"not valid JSON: {error}")]) from None
    loads = values.get("load") if isinstance(values, dict) else None
    if not isinstance(loads, dict) or not loads:
        message = f"{path} has no loads: a JSON object with `load`, and in it a list for each layer"
        raise DiagnosticError([Diagnostic("E122", message, source.span(0, 1))])
    wrong = [name for name, load in loads.items() if not _counts(load, experts)]
    if wrong:
        place = source.text.find(json.dumps(wrong[0]))
        span = source.span(place, place + len(wrong[0]) + 2) if place >= 0 else source.span(0, 1)
        message = f"`{wrong[0]}` needs {experts} whole numbers, one for each expert of the model"
        raise DiagnosticError([Diagnostic("E122", message, span)])
    return {name: tuple(load) for name, load in loads.items()}


def _counts(load: Any, experts: int) -> bool:
    return (
        isinstance(load, list)
        and len(load) == experts
        and all(type(count) is int and 0 <= count < 2**63 for count in load)
    )
