"""`dslc train`: a model of a spec, trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dslc.options import SetOption, SpecArgument, VariantOption

EXAMPLES = """
\b
Examples:
  dslc train deepseek_v3_mini --data data/tinyshakespeare.txt --out runs/mini
  dslc train deepseek_v3_mini --out runs/mini        go on where it stopped
  dslc train my_model.yaml --data a.txt --data b.jsonl --tokenizer tokenizer.json --out runs/mine
  dslc train my_model.yaml --weights published --data a.txt --out runs/tuned
  dslc train deepseek_v3_mini --set architecture.mtp.depth=0 --data a.txt --out runs/no_mtp

\b
The run holds the built package, checkpoints and metrics. Without dslc:
  python -m deepseek_v3_mini.train --data data/tinyshakespeare.txt --out runs/mini
Several processes that share the work of each step:
  torchrun --nproc-per-node 2 -m dslc train deepseek_v3_mini --data a.txt --out runs/mini
"""


def run(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option(metavar="RUN", help="The folder of the run.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text, JSON lines with a `text` each, or a folder of tokens. Repeatable.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Begin with these weights: a folder of safetensors."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A tokenizer.json; by default tokens are bytes."),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of each file, its end, not trained on [0.1]."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of first weights and of the order of data [0].")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Between checkpoints [500].")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep the newest checkpoints [2].")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Between evaluations [500].")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N [a GPU if there is one].")
    ] = None,
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

    given = {
        "data": tuple(data) if data else None,
        "weights": weights,
        "tokenizer": tokenizer,
        "held_out": held_out,
        "seed": seed,
        "save_every": save_every,
        "keep": keep,
        "eval_every": eval_every,
        "device": device,
    }
    with tempfile.TemporaryDirectory() as folder:
        with reporting():
            description = read(spec, sets, variant)
            name = description.spec.model
            build(description, Path(folder) / name)
        with using(Path(folder), name) as (command, model):
            options = {key: value for key, value in given.items() if value is not None}
            status = command.train(model, command.Options(out, **options))
    raise typer.Exit(status)
