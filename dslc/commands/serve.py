"""`dslc serve`: a trained or imported model over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dslc.commands.eval import AverageOption
from dslc.commands.import_ import SpecOption
from dslc.options import with_declared
from runtime.serve.settings import Settings

EXAMPLES = """
\b
Examples:
  dslc serve runs/mini                                the newest weights of a run
  dslc import DeepSeek-V2-Lite --to lite && dslc serve lite
  dslc serve lite --port 8080 --cache-memory 4096 --max-requests 16
  dslc serve lite --host 0.0.0.0 --api-key "$KEY"     not only for this machine
  dslc serve lite --device cpu --weights int8         a quarter of the memory of float32

\b
Then:
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "ROMEO:", "max_tokens": 50}'
  python -c 'import openai; client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1",
    api_key="none"); print(client.models.list())'
or open http://127.0.0.1:8000/ in a browser. Without dslc:
  python -m deepseek_v3_mini.serve --checkpoint FOLDER
"""


SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_FOLDER", help="A run directory of dslc train, or a folder with weights."
    ),
]


def run(
    source: SourceArgument,
    ema: AverageOption = False,
    spec: SpecOption = None,
    **given: Any,
) -> None:
    """Serve a model with the API of OpenAI: completions, chats, streams, and a chat page.

    Ctrl-C or SIGTERM lets running answers end, a second one does not.
    """
    from dslc.installed import require
    from dslc.report import reporting
    from dslc.trained import SERVE, using_source

    options = {name: value for name, value in given.items() if value is not None}
    options["api_key"] = tuple(options.get("api_key", ()))
    with reporting():
        by = "`pip install 'dslc[torch,serve]'`"
        require("serving", "torch", "safetensors", "fastapi", "uvicorn", "prometheus_client", by=by)
    found = using_source(source, spec, SERVE, weights=given["weights"])
    with found as (command, model, parent, trained):
        # The process of the engine imports the package, too.
        sys.path.insert(0, str(parent.resolve()))
        if trained:
            settings = command.Settings(checkpoint=source, **options)
            status = command.serve_run(model, source, settings, ema)
        else:
            options.setdefault("name", source.resolve().name)
            status = command.serve(model, command.Settings(checkpoint=source, **options))
    raise typer.Exit(status)


run.__signature__ = with_declared(run, Settings, ["checkpoint"])  # type: ignore[attr-defined]
