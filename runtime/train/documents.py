"""Files to documents, and documents to the tokens that a model is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
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


def documents(files: Iterable[Path]) -> Iterator[str]:
    """The texts of files: each line's `text` of *.jsonl, the whole of any other file.

    Raises TrainError for a file that cannot be read or is not text.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _lines(file)
            else:
                yield file.read_text(encoding=ENCODING)
        except OSError as error:
            raise TrainError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TrainError(f"{file} is not UTF-8 text: byte {error.start}") from None


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise TrainError(f'{file}:{number} is not a JSON object with a "text"')
            yield _whole(text)


def _whole(text: str) -> str:
    """A text as Unicode has it: JSON may hold half of a surrogate pair, which becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    eos: int | None = None,
    fim: FillInTheMiddle | None = None,
    seed: int = 0,
) -> Iterator[list[int]]:
    """The tokens of each document, with `eos` after each if there is one."""
    for index, text in enumerate(texts):
        tokens = fim.apply(text, tokenizer, f"{seed} {index}") if fim else tokenizer.encode(text)
        yield tokens if eos is None else [*tokens, eos]
