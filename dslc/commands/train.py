"""`dslc train`: a model of a spec, trained."""

from __future__ import annotations

import inspect
import os.path
import tempfile
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

import typer

from dslc.options import SetOption, SpecArgument, VariantOption
from runtime.train.options import declared

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


def with_options() -> inspect.Signature:
    """The parameters that typer reads: the options of training in place of `given`."""
    spec, sets, variants, _ = inspect.signature(run, eval_str=True).parameters.values()
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if name == "out" else None,
            annotation=Annotated[
                GenericAlias(list, (kind,)) if repeatable else kind,
                typer.Option(
                    help=option.help,
                    metavar=option.metavar,
                    min=option.minimum,
                    max=option.maximum,
                    show_default=False,
                ),
            ],
        )
        for name, kind, repeatable, option in declared()
    ]
    required = [spec, *(one for one in options if one.default is one.empty)]
    return inspect.Signature(
        [*required, *(one for one in options if one.default is None), sets, variants]
    )


run.__signature__ = with_options()  # type: ignore[attr-defined]
