"""`dslc init`: a first spec, from nothing or from a Hugging Face config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsl.source import Source

EXAMPLES = """
\b
Examples:
  dslc init my_model                                   a small spec that runs on a CPU
  dslc init --from-hf DeepSeek-V3/config.json -o v3.yaml
  dslc init --from-hf models/moonlight -o moonlight.yaml
"""
# The shipped spec that a new one starts as: complete, and trained on any machine in minutes.
START = "deepseek_v3_mini"


def run(
    name: Annotated[
        str | None,
        typer.Argument(help="The model's name; by default that of the file.", show_default=False),
    ] = None,
    from_hf: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR_OR_CONFIG_JSON",
            help="Describe the model of this config.json, of the DeepSeek V2/V3 family.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The spec to write; NAME.yaml by default."),
    ] = None,
) -> None:
    """Start a new spec, or import a config.json.

    A file that exists is never overwritten."""
    from dslc.report import reporting
    from dslc.specs import shown

    if name is None and output is None:
        raise typer.BadParameter("give the new model a name, or a file with -o")
    name = name or (output.stem if output else "")
    path = output or Path(f"{name}.yaml")
    with reporting():
        check_name(name)
        text = started(name) if from_hf is None else imported(from_hf, name)
        write_new(path, text)
    print(f"wrote {shown(path)}; next: dslc check {shown(path)}, then dslc build {shown(path)}")
    if from_hf is None:
        print(f"or: dslc train {shown(path)} --data FILE --out runs/{name}")


def check_name(name: str) -> None:
    """Raises `DiagnosticError` if no model can have this name."""
    from dsl.load import load
    from dslc.specs import shipped

    load(shipped()[START], sets=[f"model={json.dumps(name)}"])


def started(name: str) -> str:
    from dslc.specs import shipped

    text = shipped()[START].read_text(encoding="utf-8")
    return re.sub(r"^model:.*$", f"model: {name}", text, count=1, flags=re.MULTILINE)


def imported(path: Path, name: str) -> str:
    """The spec of a `config.json`. Raises `DiagnosticError` naming all it cannot express."""
    from dsl.hf import read_config, spec_from_hf

    source = config_source(path)
    return spec_from_hf(read_config(source), source, name)


def config_source(path: Path) -> Source:
    from dsl.read import read_source

    file = path / "config.json" if path.is_dir() else path
    return read_source(file, str(file))


def write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist yet. Raises `DiagnosticError` if it does."""
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from runtime.files import replace_text

    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        help = "choose another file with -o"
        problem = Diagnostic("E692", f"{path} exists, and is not overwritten", help=help)
        raise DiagnosticError([problem]) from None
    try:
        replace_text(path, text)
    except OSError:
        path.unlink(missing_ok=True)  # no empty file is left
        raise
