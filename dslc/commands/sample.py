"""`dslc sample`: text from a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from dslc.commands.eval import AverageOption, RunArgument

EXAMPLES = """
\b
Examples:
  dslc sample runs/mini --prompt "ROMEO:"
  dslc sample runs/mini --prompt "ROMEO:" --tokens 200 --temperature 0      greedy decoding
"""


def run(
    folder: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="Number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding.")] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Sample from the most likely tokens with this total probability."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    ema: AverageOption = False,
) -> None:
    """Continue a text with the newest checkpoint of a run."""
    from dslc.trained import using_run

    with using_run(folder) as (command, model):
        request = command.SampleRequest(prompt, tokens, temperature, top_p, seed)
        print(command.sample(model, folder, request, ema))
