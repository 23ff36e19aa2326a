"""`dslc train`: a model of a spec, trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from dslc.options import SetOption, SpecArgument, VariantOption

EXAMPLES = """
\b
Examples:
  dslc train deepseek_v3_mini --data data/tinyshakespeare.txt --out runs/mini
  dslc train deepseek_v3_mini --out runs/mini              go on where it stopped
  dslc train my_model.yaml --data a.txt b.jsonl --tokenizer tokenizer.json --out runs/mine
  dslc train deepseek_v3_mini --out runs/mini -- --help    all that training takes

\b
The run holds the built package, checkpoints and metrics. Without dslc:
  python -m deepseek_v3_mini.train --data data/tinyshakespeare.txt --out runs/mini
"""


def run(
    context: typer.Context,
    spec: SpecArgument,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Train a model on text; the same command again goes on where it stopped.

    How it is trained stands in the section `train` of the spec. Ctrl-C saves and leaves.
    """
    from backends.build import build
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.trained import using

    with tempfile.TemporaryDirectory() as folder:
        with reporting():
            description = read(spec, sets, variant)
            name = description.spec.model
            build(description, Path(folder) / name)
        with using(Path(folder), name) as (command, model):
            status = command.main(model, [word for word in context.args if word != "--"])
    raise typer.Exit(status)
