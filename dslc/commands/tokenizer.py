"""`dslc tokenizer`: text tokenized once for many runs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
\b
Examples:
  dslc tokenizer a.txt b.jsonl -o tokens --vocab-size 8000 --special "<eos>" --eos 0
  dslc tokenizer a.txt -o tokens --tokenizer deepseek/tokenizer.json --eos 1
  dslc tokenizer a.txt -o tokens --tokenizer bytes

\b
`dslc train --data` reads the folder; other programs can use its tokenizer.json.
"""


def run(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES", help="Text, or JSON lines with a `text` or `messages` each."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder.")],
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=257, help="Train a byte-level BPE tokenizer with at most this many tokens."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="Use this tokenizer.json, or `bytes`.")
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A special token; ids count from 0. Repeatable."),
    ] = None,
    eos: Annotated[
        int | None,
        typer.Option(min=0, help="The token after each document: eos_token_id of the spec."),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The template of chats [that next to the tokenizer]."),
    ] = None,
) -> None:
    """Tokenize text, with a tokenizer that is trained on it or given."""
    from runtime.train.documents import documents, encode, texts
    from runtime.train.prepare import chats_of
    from runtime.train.settings import TrainError
    from runtime.train.tokenizer import FILE, learn, open_tokenizer
    from runtime.train.tokens import write

    if (vocab_size is None) == (tokenizer is None):
        raise typer.BadParameter("give one of --vocab-size and --tokenizer")
    try:
        with tempfile.TemporaryDirectory() as folder:
            name = tokenizer or str(Path(folder) / FILE)
            if vocab_size is not None:
                Path(name).write_bytes(learn(texts(files), vocab_size, special or []))
            used = open_tokenizer(name)
            size = max(used.vocab_size, (eos or 0) + 1)
            chats = chats_of(used, name, chat_template)
            encoded = encode(documents(files), used, eos, chats=chats)
            header = write(output, encoded, used, size, {"eos": eos, "fim": None})
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    tokens = sum(part.tokens for part in header.parts)
    print(f"wrote {output}: {tokens:,} tokens, vocabulary {size:,}, in {len(header.parts)} file(s)")
