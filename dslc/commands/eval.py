"""`dslc eval`: evaluation of a trained model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dslc.options import Format, FormatOption

EXAMPLES = """
\b
Examples:
  dslc eval runs/mini              loss and bits per byte on held-out text
  dslc eval runs/mini --ema        with the moving average of the weights
"""

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory of `dslc train`.")
]
AverageOption = Annotated[
    bool, typer.Option("--ema", help="Use the moving average of the weights (train.ema).")
]


def run(
    folder: RunArgument, ema: AverageOption = False, format: FormatOption = Format.text
) -> None:
    """Measure the newest checkpoint of a run on held-out text."""
    from dslc.report import print_json
    from dslc.trained import using_run

    with using_run(folder) as (command, model):
        found = command.evaluate(model, folder, ema)
    if format is Format.json:
        print_json({"ok": True, "diagnostics": [], **asdict(found)})
        return
    print(f"loss           {found.loss:.4f} nats per token")
    print(f"bits per byte  {found.bits_per_byte:.4f}")
    for depth, (loss, share) in enumerate(zip(found.mtp, found.acceptance, strict=True), 1):
        print(f"MTP depth {depth}    {loss:.4f} nats per token, accepted {share:.1%}")
    print(f"tokens         {found.tokens:,}")
