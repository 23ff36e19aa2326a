"""`dslc train`: a model of a spec, trained."""

from __future__ import annotations

import os.path
import tempfile
from pathlib import Path
from typing import Any

import typer

from dslc.options import SetOption, SpecArgument, VariantOption, with_declared
from runtime.train.options import Options

EXAMPLES = """
\b
Examples:
  dslc train deepseek_v3_mini --data data/tinyshakespeare.txt --out runs/mini
  dslc train deepseek_v3_mini --out runs/mini        resume after a stop
  dslc train my_model.yaml --data a.txt --data b.jsonl --tokenizer tokenizer.json --out runs/mine
  dslc train my_model.yaml --weights published --data a.txt --out runs/tuned
  dslc train deepseek_v3_mini --set architecture.mtp.depth=0 --data a.txt --out runs/no_mtp

\b
The run holds the built package, checkpoints and metrics. Without dslc:
  python -m deepseek_v3_mini.train --data data/tinyshakespeare.txt --out runs/mini
Several ranks: by the section `parallel` of the spec, or with data parallelism where it has none:
  torchrun --nproc-per-node 2 -m dslc train deepseek_v3_mini --data a.txt --out runs/mini
"""


def run(
    spec: SpecArgument, sets: SetOption = None, variants: VariantOption = None, **given: Any
) -> None:
    """Train a model on text; the same command resumes a run that was stopped.

    The section `train` of the spec says how. Ctrl-C saves a checkpoint and exits.
    """
    from backends.build import build
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.trained import using

    options = {name: value for name, value in given.items() if value is not None}
    options["data"] = tuple(options.get("data", ()))
    with tempfile.TemporaryDirectory() as folder:
        with reporting():
            description = read(spec, sets, variants)
            name = description.spec.model
            made_from = {
                "spec": os.path.abspath(description.composed.sources[-1].path or spec),
                "variants": variants or [],
                "set": sets or [],
            }
            build(description, Path(folder) / name)
        with using(Path(folder), name) as (command, model):
            status = command.train(model, command.Options(**options), made_from)
    raise typer.Exit(status)


run.__signature__ = with_declared(run, Options)  # type: ignore[attr-defined]
