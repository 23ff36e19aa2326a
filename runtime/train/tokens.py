"""Folders of tokens: written once, then mapped into memory.

`tokens.json` says what the files `tokens-00000.bin`, .. hold: unsigned integers of 2 or 4 bytes,
little-endian, the documents concatenated. The folder has a tokenizer.json unless tokens are bytes.
Where some tokens are not trained on, `mask-00000.bin`, .. have a byte for each: 1, or 0 for those.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .settings import TrainError
from .tokenizer import Tokenizer, of_folder

INDEX = "tokens.json"
MAX_FILE_TOKENS = 2**28
TYPES = {2: ("H", torch.uint16), 4: ("I", torch.uint32)}


@dataclass(frozen=True)
class TokenFile:
    """One file: how many tokens, and the hash of its bytes. The mask may be missing."""

    file: str
    tokens: int
    sha256: str
    mask: str = ""
    mask_sha256: str = ""


@dataclass(frozen=True)
class Header:
    """The content of tokens.json. `settings` are those that documents were tokenized with."""

    width: int
    tokenizer: str
    settings: dict[str, object]
    parts: tuple[TokenFile, ...]

    @property
    def key(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, object]:
        """What tokens.json says, without the masks that are missing."""
        parts = [{k: v for k, v in asdict(part).items() if v != ""} for part in self.parts]
        return {**asdict(self), "parts": parts}


def write(
    folder: Path,
    documents: Iterable[list[int]],
    tokenizer: Tokenizer,
    vocab_size: int,
    settings: dict[str, object],
    max_file_tokens: int = MAX_FILE_TOKENS,
) -> Header:
    """Writes documents to a new folder; a document is in one file.

    A token below 0 is one that is not trained on, and the complement of what it says. Raises
    TrainError for tokens beyond `vocab_size`, documents without any, or a folder that exists or
    cannot be written.
    """
    width = 2 if vocab_size <= 2**16 else 4
    parts: list[TokenFile] = []
    try:
        folder.mkdir(parents=True)
        pending, mask = array(TYPES[width][0]), bytearray()
        for document in documents:
            tokens = [token if token >= 0 else ~token for token in document]
            largest = max(tokens, default=0)
            if largest >= vocab_size:
                raise TrainError(
                    f"token {largest} exceeds the vocabulary of the model ({vocab_size})"
                )
            if pending and len(pending) + len(tokens) > max_file_tokens:
                parts.append(_write_part(folder, len(parts), pending, mask))
                pending, mask = array(TYPES[width][0]), bytearray()
            pending.extend(tokens)
            mask.extend(token >= 0 for token in document)
        if pending:
            parts.append(_write_part(folder, len(parts), pending, mask))
        header = Header(width, tokenizer.key, settings, tuple(parts))
        tokenizer.save(folder)
        text = json.dumps(header.content(), indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise TrainError(f"{folder} exists: choose another folder") from None
    except OSError as error:
        raise TrainError(f"cannot write {folder}: {error.strerror}") from None
    if not parts:
        raise TrainError("the files hold no text")
    return header


def _write_part(folder: Path, number: int, values: array[int], mask: bytearray) -> TokenFile:
    if sys.byteorder == "big":
        values.byteswap()
    data = values.tobytes()
    name = f"tokens-{number:05d}.bin"
    (folder / name).write_bytes(data)
    part = TokenFile(name, len(values), hashlib.sha256(data).hexdigest())
    if all(mask):
        return part
    name = f"mask-{number:05d}.bin"
    (folder / name).write_bytes(mask)
    return replace(part, mask=name, mask_sha256=hashlib.sha256(mask).hexdigest())


@dataclass(frozen=True)
class Masked:
    """Tokens [n], and for each 1, or 0 where it is not trained on."""

    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> Masked:
        return Masked(self.tokens[where], self.mask[where])

    def to(self, dtype: torch.dtype) -> Tensor:
        """Tokens in a type with a sign; those that are not trained on as their complement."""
        tokens = self.tokens.to(dtype)
        return tokens.where(self.mask.bool(), ~tokens)


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

    def _map(self, part: TokenFile) -> Tensor | Masked:
        tokens = self._file(part.file, part.tokens, TYPES[self.header.width][1])
        return (
            Masked(tokens, self._file(part.mask, part.tokens, torch.uint8)) if part.mask else tokens
        )

    def _file(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        path = self.folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != count * dtype.itemsize:
            raise TrainError(f"{path} does not hold {count} tokens, as {INDEX} says")
        return torch.from_file(str(path), size=count, dtype=dtype)

    @property
    def masked(self) -> bool:
        """Whether some are not trained on."""
        return any(part.mask for part in self.header.parts)

    def verify(self) -> None:
        """Reads all files. Raises TrainError for one that has changed since it was written."""
        files = [(part.file, part.sha256) for part in self.header.parts]
        files += [(part.mask, part.mask_sha256) for part in self.header.parts if part.mask]
        for name, sha256 in files:
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise TrainError(f"{self.folder / name} is damaged: its hash differs")


def is_tokens(path: Path) -> bool:
    return (path / INDEX).is_file()


def _read_header(folder: Path) -> Header:
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = tuple(TokenFile(**part) for part in content.pop("parts"))
        header = Header(**content, parts=parts)
        names = {name for part in parts for name in (part.file, part.mask or part.file)}
        if header.width not in TYPES or any(Path(name).name != name for name in names):
            raise ValueError("not a list of token files")
        return header
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainError(f"{folder} holds no tokens: {INDEX}: {error}") from None
