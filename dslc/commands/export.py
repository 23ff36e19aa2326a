"""`dslc export`: weights for Hugging Face, vLLM and SGLang."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dslc.commands.eval import AverageOption
from dslc.commands.import_ import SpecOption
from dslc.options import Format, FormatOption
from dslc.weights import MAX_FILE, FirstValuesOption, MaxFileOption, TargetOption

EXAMPLES = """
\b
Examples:
  dslc export runs/mini --to published              the newest weights of a run
  dslc export runs/mini --to published --ema        their moving average
  dslc export saved --to published                  a folder of Model.save
  dslc export v3_bf16 --to v3_fp8 --dtype fp8       with 128 x 128 scales, as in DeepSeek-V3

\b
The same command resumes an export that was interrupted.
"""


class Stored(StrEnum):
    """The dtype of exported weights."""

    bf16 = "bf16"
    fp8 = "fp8"


def run(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_FOLDER", help="A run directory of dslc train, or a folder with weights."
        ),
    ],
    to: TargetOption,
    dtype: Annotated[
        Stored, typer.Option(help="fp8: the weights of FP8 GEMMs in FP8, as in DeepSeek-V3.")
    ] = Stored.bf16,
    ema: AverageOption = False,
    spec: SpecOption = None,
    first_values: FirstValuesOption = False,
    max_file: MaxFileOption = MAX_FILE,  # type: ignore[assignment]
    format: FormatOption = Format.text,
) -> None:
    """Write weights as a Hugging Face folder: safetensors, an index, config.json.

    Tensors that MTP modules share with the model are written for each.
    """
    from backends.read import is_run
    from backends.weights import checkpoint_in, checkpoint_of
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.weights import converted, require_torch

    with reporting(as_json=format is Format.json):
        require_torch()
        if is_run(source):
            found = checkpoint_of(source, ema)
        else:
            described = read(spec, None, None) if spec is not None else None
            found = checkpoint_in(source, described)
        fp8 = dtype is Stored.fp8
        converted(found, to, fp8=fp8, first_values=first_values, max_file=max_file, format=format)
