"""The tensors of a folder of safetensors files: what the headers say, and their values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
FP8 = "F8_E4M3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}
"""The element types that weights may be stored in, by their safetensors names."""
PICKLES = {".bin", ".pt", ".pth"}
POINTER = b"version https://git-lfs.github.com/spec/"
_NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors")
MOST_FILES = 10_000
"""Files of a model; DeepSeek-V3 has 163."""
CHUNK = 1 << 24
"""Bytes that are compared at once."""
BLOCK = 128
"""Rows and columns of an FP8 weight that share a scale."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which tensor or file; equal texts are reported together."""

    text: str
    name: str


class LoadError(Exception):
    """A folder that cannot be loaded. `problems` holds every one; the message lists them in few
    lines, names that differ only in numbers as one."""

    def __init__(self, folder: Path, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        by_text: dict[str, list[str]] = {}
        for problem in self.problems:
            by_text.setdefault(problem.text, []).append(problem.name)
        lines = [f"{text}: {line}" for text, names in by_text.items() for line in gather(names)]
        super().__init__("\n  ".join([f"cannot load {folder}; nothing was changed", *lines]))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Where its bytes begin in the file."""

    @property
    def bytes(self) -> int:
        dtype = DTYPES.get(self.dtype)
        return math.prod(self.shape) * dtype.itemsize if dtype else 0


class Shards(ExitStack):
    """The files of a folder, kept open; `entries` by tensor name, `problems` found on the way.

    With a `prefix`, only tensors whose names begin with it, and by their names without it: those of
    one part of a larger model. Only headers are read at first. `values` reads one tensor into
    memory of its own; files are not mapped, so that what was read and dropped takes no memory.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        super().__init__()
        self.folder = folder
        self.problems: list[Problem] = []
        self.entries: dict[str, TensorEntry] = {}
        self._open: dict[Path, BufferedReader] = {}
        placed = self._read_index()
        self._unread = False
        for file in self._files(placed):
            self._read_header(file)
        for name, file_name in placed.items():
            entry = self.entries.get(name)
            opened = folder / file_name in self._open
            if opened and (entry is None or entry.file.name != file_name):
                self._add(f"the index says it is in {file_name}, but it is not", name)
        self.entries = _under(prefix, self.entries)
        self._placed = _under(prefix, placed)

    def may_hold(self, name: str) -> bool:
        """Whether a tensor that is in no file may be in one that is absent or cannot be read.

        Such a file is among `problems`; that its tensors are missing follows from it.
        """
        if self._placed:
            file = self._placed.get(name)
            return file is not None and self.folder / file not in self._open
        return self._unread

    def values(self, entry: TensorEntry) -> Tensor:
        """The tensor as stored, on the CPU."""
        return tensor_in(self.bytes(entry), entry.dtype, entry.shape)

    def bytes(self, entry: TensorEntry, start: int = 0, count: int | None = None) -> bytearray:
        """The bytes that it is stored as: all, or at most `count` of them from `start` on.

        Raises OSError if the file has shrunk.
        """
        size = entry.bytes - start
        data = bytearray(size if count is None else min(count, size))
        file = self._open[entry.file]
        file.seek(entry.start + start)
        if file.readinto(data) != len(data):
            raise OSError(f"{entry.file} was changed while it was read")
        return data

    def same_bytes(self, a: TensorEntry, b: TensorEntry) -> bool:
        """Whether two tensors of one type and shape are stored as the same bytes."""
        starts = range(0, a.bytes, CHUNK)
        return all(self.bytes(a, s, CHUNK) == self.bytes(b, s, CHUNK) for s in starts)

    def _add(self, text: str, name: str) -> None:
        self.problems.append(Problem(text, name))

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file name as the index has it; empty without an index or with a broken one."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        try:
            placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in placed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._add(f"the index is not readable ({type(error).__name__}: {error})", INDEX)
            return {}

    def _files(self, placed: dict[str, str]) -> list[Path]:
        if not self.folder.is_dir():
            self._add("no such folder", str(self.folder))
            return []
        files = {path.name for path in self.folder.glob("*.safetensors")}
        if not files and not placed:
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            for name in pickles:
                self._add("a pickle can run code and is not read; convert to safetensors", name)
            if not pickles:
                self._add("the folder holds no *.safetensors file", str(self.folder))
        for name in [] if placed else sorted(_gaps(files)):
            self._unread = True
            self._add("not there, though the names of others count it", name)
        listed = set(placed.values())
        for name in sorted(listed - files):
            self._add("the index names a file that is not there", name)
        for name in sorted(files - listed if placed else ()):
            self._add("not named by the index; move the file away, or the index", name)
        return [self.folder / name for name in sorted(files)]

    def _read_header(self, file: Path) -> None:
        if _is_pointer(file):
            self._unread = True
            self._add("a Git LFS pointer, not the file itself; run `git lfs pull` there", file.name)
            return
        try:
            with safe_open(file, framework="pt"):  # refuses a header that does not fit the file
                handle = self.enter_context(file.open("rb"))
                header, data = read_header(handle)
        except (SafetensorError, OSError) as error:
            self._unread = True
            self._add(f"damaged, cut off, or no safetensors file ({error})", file.name)
            return
        self._open[file] = handle
        for name, about in header.items():
            if name in self.entries:
                self._add(f"in two files, {self.entries[name].file.name} and {file.name}", name)
            begin, _ = about["data_offsets"]
            shape, dtype = tuple(about["shape"]), str(about["dtype"])
            self.entries[name] = TensorEntry(name, file, shape, dtype, data + begin)


def _under(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {n.removeprefix(prefix): one for n, one in named.items() if n.startswith(prefix)}


def _gaps(files: Collection[str]) -> set[str]:
    """Names of files that are absent: of `model-00001-of-00003.safetensors` two."""
    counted = [found for file in files if (found := _NUMBERED.fullmatch(file))]
    named = {(start, int(of), len(of)) for start, of in (found.group(1, 3) for found in counted)}
    return {
        f"{start}-{number:0{width}}-of-{of:0{width}}.safetensors"
        for start, of, width in named
        if of <= MOST_FILES
        for number in range(1, of + 1)
    } - {*files}


def _is_pointer(file: Path) -> bool:
    """Whether a clone was made without git-lfs, which would have brought the file itself."""
    try:
        with file.open("rb") as handle:
            return handle.read(len(POINTER)) == POINTER
    except OSError:
        return False  # whoever reads it says why


def read_header(file: BufferedReader) -> tuple[dict[str, Any], int]:
    """What the header of a sound safetensors file says of each tensor; where the data begins."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def tensor_in(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that lies in `data`: writing to one changes the other."""
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """An FP8 weight [out, in] times the scale of its 128 x 128 block, in float32.

    scale [ceil(out / 128), ceil(in / 128)] is what checkpoints call `weight_scale_inv`; it is
    the multiplier all the same. The last block of a row or column may be smaller.
    """
    value = weight.float()
    spread = scale.float().repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    for rows, factors in zip(value.split(BLOCK), spread, strict=True):
        rows *= factors
    return value


def gather(names: list[str]) -> list[str]:
    """Names that differ only in numbers as one: `layers.{3..60}.gate.weight (58)`."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        # Names come from files: no control characters onto the terminal.
        safe = name if name.isprintable() else ascii(name)
        words = re.split(r"([0-9]{1,18})", safe)
        alike.setdefault(tuple(words[::2]), []).append(words[1::2])
    lines = []
    for texts, found in alike.items():
        columns = [sorted(set(column), key=int) for column in zip(*found, strict=True)]
        numbers = [c[0] if len(c) == 1 else f"{{{c[0]}..{c[-1]}}}" for c in columns]
        line = "".join(t + n for t, n in zip(texts, [*numbers, ""], strict=True))
        lines.append(line if len(found) == 1 else f"{line} ({len(found)})")
    return lines
