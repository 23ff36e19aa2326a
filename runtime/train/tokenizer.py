"""Text to tokens and back: bytes, or a file of the `tokenizers` library."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .settings import TrainError

FILE = "tokenizer.json"


class Tokenizer(ABC):
    """`vocab_size` is one more than the largest token; `key` identifies the tokenizer."""

    vocab_size: int
    key: str

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; bytes that are not text become U+FFFD."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes to `folder` what `of_folder` needs to make the same tokenizer."""


class Bytes(Tokenizer):
    """UTF-8 bytes as tokens."""

    vocab_size = 256
    key = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < self.vocab_size).decode(errors="replace")

    def save(self, folder: Path) -> None:
        pass


class Learned(Tokenizer):
    """A tokenizer.json, as published models have it; needs the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        """Raises TrainError if the file or the library is missing, or the file is not valid."""
        try:
            self.data = file.read_bytes()
        except OSError as error:
            raise TrainError(f"cannot read the tokenizer {file}: {error.strerror}") from None
        try:
            self._tokenizer: Any = _library().Tokenizer.from_buffer(self.data)
        except ValueError as error:
            raise TrainError(f"{file} is not a file of the `tokenizers` library: {error}") from None
        # Only packing adds special tokens: no document can contain one.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.key = hashlib.sha256(self.data).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(self.data)


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json. Raises TrainError."""
    return Bytes() if name == Bytes.key else Learned(Path(name))


def of_folder(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder."""
    return Learned(folder / FILE) if (folder / FILE).exists() else Bytes()


def learn(texts: Iterable[str], vocab_size: int, special: list[str]) -> bytes:
    """A tokenizer.json of byte-level BPE with at most `vocab_size` tokens, learned from texts.

    The special tokens come first. Any text can be encoded, and decodes to itself.
    Raises TrainError without the `tokenizers` library.
    """
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str()).encode()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise TrainError("this needs the library tokenizers: pip install tokenizers") from None
    return tokenizers
