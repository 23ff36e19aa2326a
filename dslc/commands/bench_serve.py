"""`dslc bench-serve`: how fast a server answers under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dslc.options import Format, FormatOption

EXAMPLES = """
\b
Examples:
  dslc bench-serve                                  100 requests at once, 16 at a time
  dslc bench-serve --rate 4 --prompt 64:512 --new 64
  dslc bench-serve --shared 0.8 --text data/tinyshakespeare.txt
  dslc bench-serve http://127.0.0.1:8080 --format json

\b
Servers of vLLM take the same requests. `answers` is a hash of all texts: dslc gives equal answers
to equal requests, independent of the load.
"""

MOST_TEXT = 2**20
"""Characters of --text that are used: a server refuses long bodies."""


def parse_range(text: str) -> tuple[int, int]:
    """`64` or `64:512`, at least 1."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        raise typer.BadParameter(f"{text} is not a number or a range such as 64:512") from None
    if not 1 <= found[0] <= found[1]:
        raise typer.BadParameter(f"{text} does not go from 1 or more upwards")
    return found


def run(
    url: Annotated[str, typer.Argument(metavar="URL")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 100,
    rate: Annotated[
        float, typer.Option(min=0, help="Requests a second, at random; 0: as --at-once allows.")
    ] = 0,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most requests at a time [16; with --rate all].", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(metavar="N[:N]", help="Tokens of a prompt, at random in a range.")
    ] = "64:256",
    new: Annotated[str, typer.Option(metavar="N[:N]", help="Tokens of an answer.")] = "64",
    shared: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a prompt that all begin with.")
    ] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to cut prompts from; by default they are random tokens.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding.")] = 1,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")] = 0,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="DSLC_API_KEY", help="The key.", show_default=False),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Measure a server: throughput, time to the first token, time between tokens."""
    from dslc.load import Load, ServerClient, measure, summary
    from dslc.report import print_json, print_table, reporting

    lengths = parse_range(prompt), parse_range(new)
    with reporting(as_json=format is Format.json):
        server = ServerClient(url, api_key)
        ids = None
        if text is not None:
            body = {"prompt": text.read_text(encoding="utf-8", errors="replace")[:MOST_TEXT]}
            ids = server.answer("/tokenize", body)["tokens"]
        most = at_once or (requests if rate else 16)
        load = Load(requests, rate, most, *lengths, shared, temperature, seed)
        found = summary(*measure(server, load, ids))
    if format is Format.json:
        print_json({"ok": not found["failed"], "diagnostics": [], **found})
    else:
        rows: list[tuple[str, ...]] = [("ms", "mean", "median", "p95", "p99")]
        for name in ("first_token_ms", "between_tokens_ms", "request_ms"):
            cells = [f"{found[name][key]:,.1f}" if found[name] else "-" for key in rows[0][1:]]
            rows.append((name.removesuffix("_ms").replace("_", " "), *cells))
        print_table(rows, "<>>>>")
        print()
        print_table(
            [
                ("requests/s", f"{found['requests_per_second']:,.2f}"),
                ("new tokens/s", f"{found['new_tokens_per_second']:,.1f}"),
                ("prompt tokens/s", f"{found['prompt_tokens_per_second']:,.1f}"),
                ("from prefix cache", f"{found['cached_tokens']:,}"),
                ("seconds", f"{found['seconds']:,.1f}"),
                ("failed", f"{found['failed']} of {found['requests']}"),
                ("answers", found["answers"]),
            ],
            "<>",
        )
        for error in found["errors"][:5]:
            print(f"failed: {error}")
    raise typer.Exit(1 if found["failed"] else 0)
