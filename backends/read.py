"""A build read back, by itself or in a run: its values, its graphs, its plan. None of it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.build import GENERATOR, MANIFEST
from compiler.graph.core import Program
from compiler.graph.parse import parse_program
from compiler.graph.verify import verify
from compiler.pipeline import PIPELINES
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.hf import read_config
from dsl.load import Resolved
from dsl.read import read_source

LOWERED = "graph/00-all-lower.graph"
PROGRAM = re.compile(r"graph/([a-z_]+)\.graph")
PLAN = "plan.json"
RECORD = "run.json"


@dataclass(frozen=True)
class Built:
    """What a build says of its model. `plan` holds `plan.json` where the spec has a layout."""

    model: str
    values: tuple[Resolved, ...]
    lowered: Program
    programs: Mapping[str, Program]
    plan: Mapping[str, Any] | None


def is_build(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def read_run(run: Path) -> Mapping[str, Any]:
    """What run.json says, with the `model` whose build is in the run, and its `seed`.

    Raises `DiagnosticError`: a stranger may have written it.
    """
    record = read_config(read_source(run / RECORD, str(run / RECORD)))
    model, seed = record.get("model"), record.get("seed")
    if not (isinstance(model, str) and model.isidentifier() and isinstance(seed, int)):
        raise DiagnosticError([Diagnostic("E612", f"{run / RECORD} does not name model and seed")])
    return record


def read_build(folder: Path) -> Built:
    """The build in a folder. Raises `DiagnosticError`: a stranger may have written it."""
    manifest = _json(folder / MANIFEST)
    try:
        if manifest["generator"] != GENERATOR:
            raise KeyError("generator")
        model = str(manifest["model"])
        values = [
            Resolved(str(v["path"]), str(v["value"]), str(v["origin"])) for v in manifest["values"]
        ]
        outputs = [str(name) for name in manifest["outputs"]]
    except (KeyError, TypeError):
        message = f"{folder} is no build that this dslc understands"
        help = "build the model again, or name its spec"
        raise DiagnosticError([Diagnostic("E604", message, help=help)]) from None
    names = {m[1]: m[0] for name in outputs if (m := PROGRAM.fullmatch(name))}
    if missing := [name for name in PIPELINES if name not in names]:
        message = f"{folder} has no graph of {', '.join(missing)}"
        raise DiagnosticError([Diagnostic("E604", message, help="build the model again")])
    programs = {name: _program(folder / path) for name, path in names.items()}
    plan = _json(folder / PLAN) if PLAN in outputs else None
    return Built(model, tuple(values), _program(folder / LOWERED), programs, plan)


def _program(path: Path) -> Program:
    program = parse_program(read_source(path, str(path)))
    verify(program)
    return program


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(read_source(path, str(path)).text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DiagnosticError([Diagnostic("E604", f"{path} holds no JSON object")])
    return value
