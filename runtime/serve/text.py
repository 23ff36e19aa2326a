"""Tokens to text as they come: the bytes of tokens, the text of bytes, and stop strings."""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from ..train.tokenizer import Bytes, Learned, Tokenizer

REPLACEMENT = "\ufffd"


class Vocabulary(ABC):
    """Text to tokens and back, for prompts and answers."""

    special: frozenset[int] = frozenset()
    """Tokens that are marks, not text, by the tokenizer's own account."""

    @abstractmethod
    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Tokens of a text in which special tokens are parsed.

        `add_special` adds what the tokenizer has at the beginning or end of a text, such as BOS.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included. Ids without a token are left out."""

    @abstractmethod
    def piece(self, id: int) -> bytes | None:
        """The bytes of a token; None if they depend on the tokens around it."""

    def detokenizer(self) -> Detokenizer:
        """For one answer; it begins after the prompt."""
        return BytesDetokenizer(self)


class Detokenizer(Protocol):
    """Text of an answer. The texts of `feed` and `end` joined are that of all its tokens."""

    def feed(self, id: int) -> str:
        """The text that is known with one more token."""

    def end(self) -> str:
        """What was held back."""


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    if isinstance(tokenizer, Learned):
        return LearnedVocabulary(tokenizer.data)
    assert isinstance(tokenizer, Bytes)
    return ByteVocabulary()


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes; tokens beyond them have no text."""

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.piece, ids)).decode(errors="replace")

    def piece(self, id: int) -> bytes:
        return bytes((id,)) if 0 <= id < 256 else b""


class LearnedVocabulary(Vocabulary):
    """A tokenizer.json, in which special tokens are parsed."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.tokenizer = load_tokenizer(data)
        content = json.loads(data)
        added = content.get("added_tokens") or ()
        self.special = frozenset(one["id"] for one in added if one.get("special"))
        self._bytes_of = _bytes_of(content.get("decoder"))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def piece(self, id: int) -> bytes | None:
        if self._bytes_of is None:
            return None
        token = self.tokenizer.id_to_token(id)
        return b"" if token is None else self._bytes_of(token)

    def detokenizer(self) -> Detokenizer:
        return WindowDetokenizer(self) if self._bytes_of is None else BytesDetokenizer(self)


def load_tokenizer(data: bytes) -> Any:
    """A `tokenizers.Tokenizer` of a tokenizer.json that neither cuts nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@cache
def _byte_alphabet() -> Mapping[str, int]:
    """The character by which byte-level BPE writes each byte, inverted.

    Printable bytes are themselves; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    """Added tokens are in no alphabet; they are what they say."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _spaces(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes((int(token[3:5], 16),))
        except ValueError:
            pass
    return _spaces(token)


def _decoders(decoder: Any) -> Iterator[Mapping[str, Any]]:
    yield from decoder.get("decoders", (decoder,)) if isinstance(decoder, dict) else ()


def _bytes_of(decoder: Any) -> Any:
    """What gives the bytes of a token; None where the `decoder` of a tokenizer.json is another.

    A decoder that strips one space does so where a text begins. An answer goes on with a text, so
    that its spaces stay.
    """
    steps = list(_decoders(decoder))
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level
    spaces = all(
        step.get("pattern") == {"String": "▁"} and step.get("content") == " "
        for step in steps
        if step["type"] == "Replace"
    )
    marked = {"Replace", "Metaspace"} & kinds
    if not (
        marked and spaces and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    ):
        return None
    return _byte_fallback if "ByteFallback" in kinds else _spaces


class BytesDetokenizer:
    """For tokens that are bytes wherever they stand; a character comes when its last byte does."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        return self._decoder.decode(self._vocabulary.piece(id) or b"")

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For decoders that join tokens by rules of their own.

    The text of a token is what it adds to the text of those since the last but one that added any.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._decode = vocabulary.decode
        self._ids: list[int] = []
        self._shown = 0  # of these, so many have been shown

    def feed(self, id: int) -> str:
        self._ids.append(id)
        new = self._new()
        if not new or new.endswith(REPLACEMENT):  # perhaps a character that is not whole yet
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return new

    def end(self) -> str:
        new = self._new()
        self._shown = len(self._ids)
        return new

    def _new(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]


class StopStrings:
    """Ends a text before the first of some strings to be complete, however the text is cut.

    Of two that are complete at once, it is the first in the list. What may be the beginning of one
    is held back: less than the longest of them.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include` leaves the string itself in the text."""
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What of the text so far can be shown, and has not been. Nothing after the end."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [
            (start + len(stop), order)
            for order, stop in enumerate(self._stops)
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            end, order = min(ends)
            self.found = self._stops[order]
            shown = self._held[: end if self._include else end - len(self.found)]
            self._held = ""
            return shown
        cut = len(self._held) - self._partial()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _partial(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def end(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown
