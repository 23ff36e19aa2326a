"""The tokens of a run: made from text, or read from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, end_tokens
from .documents import Chats, FillInTheMiddle, documents, encode
from .settings import TrainError
from .tokenizer import Tokenizer, open_tokenizer
from .tokens import Tokens, is_tokens, write

if TYPE_CHECKING:
    from ..serve.chat import Chat


def prepare_tokens(
    files: Sequence[Path],
    place: Path,
    config: Config,
    tokenizer: str,
    seed: int,
    chat_template: Path | None = None,
) -> Path:
    """The given folder of tokens, or `place`, to which those of the given texts are written.

    `chat_template` renders chats; by default that next to the tokenizer does. Raises TrainError
    without files, for files that cannot be read, and for a folder of tokens among other files.
    """
    if not files:
        raise TrainError("give the text to train on: --data FILE")
    if len(files) == 1 and is_tokens(files[0]):
        return files[0]
    if folders := [file for file in files if is_tokens(file)]:
        raise TrainError(
            f"{folders[0]} holds tokens, which cannot be joined with other files: give it alone, "
            f"or give all of the text"
        )
    used = open_tokenizer(tokenizer)
    fim, eos = FillInTheMiddle.of(config), end_of_document(config)
    chats = chats_of(used, tokenizer, chat_template)
    texts = encode(documents(files), used, eos, fim, seed, chats)
    shutil.rmtree(place, ignore_errors=True)  # left by a run that could not start
    write(place, texts, used, config.params.vocab_size, token_settings(config))
    return place


def chats_of(tokenizer: Tokenizer, name: str, template: Path | None) -> Chats:
    """How conversations are encoded: by a template, or that next to the tokenizer `name`.

    As a server does it (`serve/chat.py`), whose library only who has conversations needs. What it
    gives raises TrainError for a template that cannot be read, ValueError for what one refuses.
    """

    @cache
    def chat() -> Chat:
        try:
            from ..serve.chat import Chat, ChatError, template_of
            from ..serve.text import vocabulary_of
        except ModuleNotFoundError as error:
            reason = f"{error}: chats need the library jinja2 (pip install jinja2)"
            raise TrainError(reason) from None
        vocabulary = vocabulary_of(tokenizer)
        try:
            found = template_of(Path(name).parent, vocabulary, template)
        except ChatError as error:
            raise TrainError(str(error)) from None
        if found is None:
            raise ValueError(
                "this is a chat, and the tokenizer has no chat template next to it: give "
                "--chat-template FILE"
            )
        return Chat(found, vocabulary)

    return lambda messages: chat().answers(messages)


def check_tokens(tokens: Tokens, config: Config) -> None:
    """Raises TrainError for tokens that do not match the spec."""
    if tokens.header.settings != token_settings(config):
        raise TrainError(
            f"{tokens.folder} was made with {tokens.header.settings}, but the spec asks for "
            f"{token_settings(config)}: tokenize the text again, or give it as --data"
        )
    known, size = tokens.tokenizer.vocab_size, config.params.vocab_size
    if known > size:
        raise TrainError(f"the tokenizer has {known} tokens, the model's vocab_size is {size}")


def token_settings(config: Config) -> dict[str, object]:
    """What tokens depend on, apart from tokenizer and text."""
    fim = config.train.fim
    return {
        "eos": end_of_document(config),
        "fim": {name: fim[name] for name in fim} if fim else None,
    }


def end_of_document(config: Config) -> int | None:
    """The token after each document."""
    return next(iter(end_tokens(config)), None)
