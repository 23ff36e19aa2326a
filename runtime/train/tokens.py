"""Folders of tokens: written once, then mapped into memory.

`tokens.json` says what the files `tokens-00000.bin`, .. hold: unsigned integers of 2 or 4 bytes,
little-endian, the documents concatenated. The folder has a tokenizer.json unless tokens are bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import TrainError
from .tokenizer import Tokenizer, of_folder

INDEX = "tokens.json"
MAX_FILE_TOKENS = 2**28
TYPES = {2: ("H", torch.uint16), 4: ("I", torch.uint32)}


@dataclass(frozen=True)
class Part:
    """One file: how many tokens, and the hash of its bytes."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """The content of tokens.json. `settings` are those that documents were tokenized with."""

    width: int
    tokenizer: str
    settings: dict[str, object]
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def write(
    folder: Path,
    documents: Iterable[list[int]],
    tokenizer: Tokenizer,
    vocab_size: int,
    settings: dict[str, object],
    max_file_tokens: int = MAX_FILE_TOKENS,
) -> Header:
    """Writes documents to a new folder; a document is in one file.

    Raises TrainError for tokens beyond `vocab_size`, documents without any, or a folder that
    exists or cannot be written.
    """
    width = 2 if vocab_size <= 2**16 else 4
    parts: list[Part] = []
    try:
        folder.mkdir(parents=True)
        pending = array(TYPES[width][0])
        for tokens in documents:
            largest = max(tokens, default=0)
            if largest >= vocab_size:
                raise TrainError(
                    f"token {largest} exceeds the vocabulary of the model ({vocab_size})"
                )
            if pending and len(pending) + len(tokens) > max_file_tokens:
                parts.append(_write_part(folder, len(parts), pending))
                pending = array(TYPES[width][0])
            pending.extend(tokens)
        if pending:
            parts.append(_write_part(folder, len(parts), pending))
        header = Header(width, tokenizer.key, settings, tuple(parts))
        tokenizer.save(folder)
        text = json.dumps(asdict(header), indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise TrainError(f"{folder} exists: choose another folder") from None
    except OSError as error:
        raise TrainError(f"cannot write {folder}: {error.strerror}") from None
    if not parts:
        raise TrainError("the files hold no text")
    return header


def _write_part(folder: Path, number: int, values: array[int]) -> Part:
    if sys.byteorder == "big":
        values.byteswap()
    data = values.tobytes()
    name = f"tokens-{number:05d}.bin"
    (folder / name).write_bytes(data)
    return Part(name, len(values), hashlib.sha256(data).hexdigest())


class Tokens:
    """The tokens of a folder; `parts` are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """Raises TrainError for a folder that is damaged or holds no tokens."""
        self.folder = folder
        self.header = _read_header(folder)
        self.tokenizer = of_folder(folder)
        if self.tokenizer.key != self.header.tokenizer:
            raise TrainError(f"{folder}: its tokens were made with another tokenizer")
        self.parts = [self._map(part) for part in self.header.parts]

    def _map(self, part: Part) -> Tensor:
        path, width = self.folder / part.file, self.header.width
        size = path.stat().st_size if path.exists() else -1
        if size != part.tokens * width:
            raise TrainError(f"{path} does not hold {part.tokens} tokens, as {INDEX} says")
        return torch.from_file(str(path), size=part.tokens, dtype=TYPES[width][1])

    def verify(self) -> None:
        """Reads all files. Raises TrainError for one that has changed since it was written."""
        for part in self.header.parts:
            with (self.folder / part.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
                    raise TrainError(f"{self.folder / part.file} is damaged: its hash differs")


def is_tokens(path: Path) -> bool:
    return (path / INDEX).is_file()


def _read_header(folder: Path) -> Header:
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = tuple(Part(**part) for part in content.pop("parts"))
        header = Header(**content, parts=parts)
        names = {part.file for part in parts}
        if header.width not in TYPES or any(Path(name).name != name for name in names):
            raise ValueError("not a list of token files")
        return header
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainError(f"{folder} holds no tokens: {INDEX}: {error}") from None
