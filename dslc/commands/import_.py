"""`dslc import`: published weights, verified, in BF16."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dslc.options import Format, FormatOption
from dslc.weights import MAX_FILE, FirstValuesOption, MaxFileOption, TargetOption

EXAMPLES = """
\b
Examples:
  dslc import DeepSeek-V3 --to v3_bf16
  dslc import my_model --spec my_model.yaml --to imported     not of the DeepSeek family

\b
Then, to use the weights:
  dslc init --from-hf v3_bf16 -o v3.yaml
  dslc build v3.yaml
  python -c 'import v3; model = v3.load("v3_bf16")'           where build/ is on sys.path
The same command resumes an import that was interrupted.
"""

SpecOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="The spec of the model, if config.json does not describe it.",
        show_default=False,
    ),
]


def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder of safetensors files, with a config.json."),
    ],
    to: TargetOption,
    spec: SpecOption = None,
    first_values: FirstValuesOption = False,
    max_file: MaxFileOption = MAX_FILE,  # type: ignore[assignment]
    format: FormatOption = Format.text,
) -> None:
    """Read published weights, in BF16 or FP8, into a checkpoint in BF16.

    All tensors of the model must be present, and no others. Copies must be equal.
    """
    from backends.weights import checkpoint_in
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.weights import converted, require_torch

    with reporting(as_json=format is Format.json):
        require_torch()
        described = read(spec, None, None) if spec is not None else None
        found = checkpoint_in(folder, described)
        converted(found, to, fp8=False, first_values=first_values, max_file=max_file, format=format)
