"""The tokens of a run: made from text, taken from a folder, or those that it was begun with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..config import Config
from .documents import FillInTheMiddle, documents, encode
from .settings import TrainError
from .tokenizer import open_tokenizer
from .tokens import Tokens, is_tokens, write


def prepared(files: Sequence[Path], place: Path, config: Config, tokenizer: str, seed: int) -> Path:
    """The folder of tokens that was given, or `place`, with those of the texts that were.

    Raises TrainError for files that cannot be read, where there is none, and for tokens among
    others.
    """
    if not files:
        raise TrainError("give the text to train on: --data FILES")
    if len(files) == 1 and is_tokens(files[0]):
        return files[0]
    if folders := [file for file in files if is_tokens(file)]:
        raise TrainError(
            f"{folders[0]} holds tokens, which cannot be joined with others: give it alone, or all "
            f"of the text"
        )
    used = open_tokenizer(tokenizer)
    eos = config.sequence.eos_token_id
    texts = encode(documents(files), used, eos, FillInTheMiddle.of(config), seed)
    shutil.rmtree(place, ignore_errors=True)  # of a run that could not begin
    write(place, texts, used, config.params.vocab_size, made_with(config))
    return place


def check(tokens: Tokens, config: Config) -> None:
    """Raises TrainError for tokens that are not what the spec asks for."""
    if tokens.header.settings != made_with(config):
        raise TrainError(
            f"{tokens.folder} was made with {tokens.header.settings}, the spec asks for "
            f"{made_with(config)}: make the tokens anew, as a run that begins with --data TEXT "
            f"does in its folder data"
        )
    known, size = tokens.tokenizer.vocab_size, config.params.vocab_size
    if known > size:
        raise TrainError(f"the tokenizer has {known} tokens, the model's vocab_size is {size}")


def made_with(config: Config) -> dict[str, object]:
    """What tokens depend on besides tokenizer and text."""
    fim = config.train.fim
    return {
        "eos": config.sequence.eos_token_id,
        "fim": {name: fim[name] for name in fim} if fim else None,
    }
