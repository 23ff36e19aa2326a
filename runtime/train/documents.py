"""Files to documents, and documents to the tokens that a model is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from .settings import TrainError
from .tokenizer import Tokenizer

ENCODING = "utf-8-sig"
"""UTF-8, with or without the byte order mark that some programs write at the beginning."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """Fill in the middle: a fraction of documents is rearranged (arXiv 2207.14255).

    To `begin prefix hole suffix end middle`, with three special tokens: PSM, as in DeepSeek-V3
    (report, section 4.1).
    """

    rate: float
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, config: Config) -> FillInTheMiddle | None:
        """The setting of a spec, if it has one."""
        fim = config.train.fim
        return cls(fim.rate, fim.begin, fim.hole, fim.end) if fim else None

    def apply(self, text: str, tokenizer: Tokenizer, key: str) -> list[int]:
        """The tokens of a document, rearranged or not; `key` alone decides."""
        drawn = hashlib.sha256(key.encode()).digest()
        chance, first, second = (int.from_bytes(drawn[i : i + 8], "big") for i in (0, 8, 16))
        if chance / 2**64 >= self.rate:
            return tokenizer.encode(text)
        a, b = sorted((first % (len(text) + 1), second % (len(text) + 1)))
        before, middle, after = (tokenizer.encode(t) for t in (text[:a], text[a:b], text[b:]))
        return [self.begin, *before, self.hole, *after, self.end, *middle]


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat, each with its `role` and `content`; `place` is where they come from.

    It is trained on what the assistant says.
    """

    messages: tuple[Mapping[str, str], ...]
    place: str


def documents(files: Iterable[Path]) -> Iterator[str | Conversation]:
    """The documents of files: each line's `text` or `messages` of *.jsonl, the whole of any other
    file.

    Raises TrainError for a file that cannot be read or is not text.
    """
    for file in files:
        try:
            if file.is_char_device() or file.is_block_device():
                raise TrainError(f"{file} is a device, not a file of text")
            if file.suffix == ".jsonl":
                yield from _lines(file)
            else:
                yield file.read_text(encoding=ENCODING)
        except OSError as error:
            raise TrainError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TrainError(f"{file} is not UTF-8 text: byte {error.start}") from None


def texts(files: Iterable[Path]) -> Iterator[str]:
    """The texts of files, those of messages included. Raises TrainError as `documents` does."""
    for document in documents(files):
        if isinstance(document, str):
            yield document
        else:
            yield from (message["content"] for message in document.messages)


def _lines(file: Path) -> Iterator[str | Conversation]:
    with file.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            place = f"{file}:{number}"
            if not isinstance(row, dict) or len(row.keys() & {"text", "messages"}) != 1:
                raise TrainError(f'{place} is not a JSON object with a "text" or "messages"')
            if "messages" in row:
                yield Conversation(tuple(_messages(row["messages"], place)), place)
            elif isinstance(row["text"], str):
                yield _whole(row["text"])
            else:
                raise TrainError(f'{place} has a "text" that is no text')


def _messages(found: object, place: str) -> Iterator[Mapping[str, str]]:
    """The messages of a row, if one of them is an answer that can be trained on."""
    if not isinstance(found, list) or not found:
        raise TrainError(f'{place} has "messages" that are no list of messages')
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TrainError(f'{place}: message {number} has no "role" and "content"')
        if wrong := [name for name, value in message.items() if not isinstance(value, str)]:
            raise TrainError(f"{place}: the {wrong[0]} of message {number} is no text")
        yield {name: _whole(value) for name, value in message.items()}
    if all(message["role"] != "assistant" for message in found):
        raise TrainError(f"{place} has no message of the assistant, so that nothing is trained on")


def _whole(text: str) -> str:
    """A text as Unicode has it: JSON may hold half of a surrogate pair, which becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


Chats = Callable[[Sequence[Mapping[str, str]]], list[tuple[int, bool]]]
"""The tokens of messages, each with whether it is trained on."""


def encode(
    documents: Iterable[str | Conversation],
    tokenizer: Tokenizer,
    eos: int | None = None,
    fim: FillInTheMiddle | None = None,
    seed: int = 0,
    chats: Chats | None = None,
) -> Iterator[list[int]]:
    """The tokens of each document, with `eos` after each if there is one.

    Those of conversations that are not trained on are given as their complement, `~token`; only
    texts are filled in the middle. Raises TrainError for conversations that `chats` refuses.
    """
    for index, document in enumerate(documents):
        if isinstance(document, Conversation):
            yield _encode_chat(document, chats, eos)
            continue
        key = f"{seed} {index}"
        tokens = fim.apply(document, tokenizer, key) if fim else tokenizer.encode(document)
        yield tokens if eos is None else [*tokens, eos]


def _encode_chat(chat: Conversation, chats: Chats | None, eos: int | None) -> list[int]:
    if chats is None:
        raise TrainError(f"{chat.place}: this is a chat, and no template is given for it")
    try:
        found = chats(chat.messages)
    except ValueError as error:
        raise TrainError(f"{chat.place}: {error}") from None
    if not any(said for _, said in found):
        raise TrainError(f"{chat.place}: the chat template shows nothing that the assistant says")
    tokens = [token if said else ~token for token, said in found]
    if eos is not None and found[-1][0] != eos:
        tokens.append(eos if chat.messages[-1]["role"] == "assistant" else ~eos)
    return tokens
