"""From one folder of safetensors to another, tensor by tensor: cast, quantized or multiplied out.

A conversion works in `TARGET.partial` and renames it at the end, so that TARGET is complete or
absent. Killed and begun again, it keeps every file that has the bytes it was written with. One
tensor is in memory at a time, regardless of the size of the files. `audit.json` says of each tensor
what was read and what was written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .audit import AUDIT, Row, Table, known_hashes, lines, row
from .files import sync
from .recode import StorageFormat, TensorSpec, recode
from .shards import DTYPES, INDEX, Problem, Shards
from .sources import Sources, TensorSource

RECORDS, ASKED = "records", "conversion.json"
MAX_SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 24


class ConversionError(Exception):
    """Weights that cannot be converted, with every reason. Nothing is at the target."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{one.name}: {one.text}" for one in problems))


class TargetError(ConversionError):
    """A place that nothing can be written to, and why."""

    def __init__(self, place: Path, text: str) -> None:
        super().__init__([Problem(text, str(place))])


@dataclass(frozen=True)
class ConversionProgress:
    """How far a conversion is, in files to write and in bytes of weights to read."""

    shard: int
    shards: int
    bytes: int
    total: int
    kept: int
    """Bytes of `bytes` that an earlier attempt has converted."""


@dataclass(frozen=True)
class Extent:
    """Where a part lies in the file that is written."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class OutputFile:
    """A file that is written: its header, and where each part goes."""

    file: str
    wanted: tuple[TensorSpec, ...]
    header: bytes
    places: Mapping[str, Extent]

    @property
    def size(self) -> int:
        return len(self.header) + sum(place.size for place in self.places.values())


def convert(
    folder: Path,
    target: Path,
    wanted: Sequence[TensorSpec],
    form: StorageFormat,
    files: Mapping[str, str],
    *,
    prefix: str = "",
    unread: Collection[str] = (),
    beside: Sequence[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Callable[[ConversionProgress], None] = lambda _: None,
) -> Table:
    """Writes the `wanted` tensors of a folder to `target`, as `form` asks; gives the audit.

    Where the model is a part of a larger one, `prefix` is what its names begin with in the folder;
    `unread` are tensors there that are no part of it.
    The target gets the texts of `files` besides, those `beside` unchanged, and an index.

    Raises ConversionError with all problems: tensors missing, left over, of the wrong shape or type
    (before anything is written); not finite, left at their first values, or with other bytes than
    the audit of the folder says (files without such a tensor are kept for the next attempt).
    TargetError for a target that is not empty. OSError when files cannot be read or written.
    """
    target = Path(os.path.normpath(target))
    if target.name in ("", ".."):
        target = target.resolve()
    partial = target.with_name(f"{target.name}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TargetError(target, "exists, and is not overwritten")
    with Shards(folder, prefix) as shards:
        if not shards.entries and shards.problems:
            raise ConversionError(shards.problems)
        sources = Sources(
            shards,
            {one.name: one.shape for one in wanted if not one.copy_of},
            {one.name: one.copy_of for one in wanted if one.copy_of},
            unread,
        )
        known, faults = known_hashes(folder)
        if problems := [*sources.problems, *faults]:
            raise ConversionError(problems)
        layout = lay_out(wanted, form, max_shard_bytes)
        partial.mkdir(parents=True, exist_ok=True)
        with _alone(partial):
            _take_up(partial, _asked(shards, layout, form), form.first)
            work = _Work(shards, sources, known, form, partial, layout, report)
            work.run()
            _write_index(partial, layout)
            for name, data in files.items():
                _write(partial / name, [data])
            for path in beside:
                shutil.copyfile(path, partial / path.name)
            table = _write_audit(partial, work.records(), folder, form)
            sync(partial)
            partial.replace(target)
            sync(target.parent)
            shutil.rmtree(target / RECORDS)
            (target / ASKED).unlink()
    return table


def lay_out(
    wanted: Sequence[TensorSpec], form: StorageFormat, max_shard_bytes: int
) -> list[OutputFile]:
    """The files to write: tensors in order, in files of at most so many bytes of weights.

    A larger tensor has a file to itself. Scales are in the file of their weight.
    """
    groups: list[list[TensorSpec]] = [[]]
    left = max_shard_bytes
    for one in wanted:
        size = sum(Extent(dtype, shape, 0).size for _, dtype, shape in form.parts(one))
        if groups[-1] and size > left:
            groups.append([])
            left = max_shard_bytes
        groups[-1].append(one)
        left -= size
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0], form)]
    names = (f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1))
    return [_shard(name, group, form) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, wanted: Sequence[TensorSpec], form: StorageFormat) -> OutputFile:
    parts = [part for one in wanted for part in form.parts(one)]
    # Widest types first, so that each part begins at a multiple of its element's size.
    parts.sort(key=lambda part: -DTYPES[part[1]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in parts:
        end = at + Extent(dtype, shape, 0).size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    places = {n: Extent(d, s, len(data) + header[n]["data_offsets"][0]) for n, d, s in parts}
    return OutputFile(file, tuple(wanted), data, places)


class _Work:
    """The files of a conversion, one after another."""

    def __init__(
        self,
        shards: Shards,
        sources: Sources,
        known: Mapping[str, str],
        form: StorageFormat,
        partial: Path,
        layout: Sequence[OutputFile],
        report: Callable[[ConversionProgress], None],
    ) -> None:
        self.shards, self.sources, self.known, self.form = shards, sources, known, form
        self.partial, self.layout, self.report = partial, layout, report
        self.total = sum(self._size(one) for shard in layout for one in shard.wanted)
        self.done = self.kept = 0

    def run(self) -> None:
        (self.partial / RECORDS).mkdir(exist_ok=True)
        for left in self.partial.glob("*.part"):
            left.unlink()
        problems: list[Problem] = []
        todo = []
        for number, shard in enumerate(self.layout, 1):
            if self._is_written(shard):
                self.kept += sum(map(self._size, shard.wanted))
                self.done = self.kept
                self._tell(number)
            else:
                todo.append((number, shard))
        self._require_room([shard for _, shard in todo])
        for number, shard in todo:
            problems += self._shard(number, shard)
        if problems and not list(self.partial.glob("*.safetensors")):
            shutil.rmtree(self.partial)
        if problems:
            raise ConversionError(problems)

    def records(self) -> Iterator[Row]:
        for shard in self.layout:
            yield from json.loads(self._record(shard).read_text(encoding="utf-8"))

    def _source(self, wanted: TensorSpec) -> TensorSource:
        """Copies are equal to their originals, and may be absent."""
        return self.sources.of[wanted.copy_of or wanted.name]

    def _size(self, wanted: TensorSpec) -> int:
        source = self._source(wanted)
        return source.entry.bytes + (source.scale.bytes if source.scale else 0)

    def _tell(self, number: int) -> None:
        self.report(ConversionProgress(number, len(self.layout), self.done, self.total, self.kept))

    def _record(self, shard: OutputFile) -> Path:
        return self.partial / RECORDS / f"{shard.file}.json"

    def _is_written(self, shard: OutputFile) -> bool:
        """Whether a file is there with the bytes that its record says were written."""
        try:
            rows = json.loads(self._record(shard).read_text(encoding="utf-8"))
            with (self.partial / shard.file).open("rb") as file:
                if os.fstat(file.fileno()).st_size != shard.size:
                    return False
                if file.read(len(shard.header)) != shard.header:
                    return False
                hashes = {p["name"]: p["sha256"] for one in rows for p in one["written"]}
                return hashes.keys() == shard.places.keys() and all(
                    _hash_of(file, place) == hashes[name] for name, place in shard.places.items()
                )
        except (OSError, ValueError):
            return False

    def _require_room(self, todo: Sequence[OutputFile]) -> None:
        need, free = sum(shard.size for shard in todo), shutil.disk_usage(self.partial).free
        if need > free:
            text = f"{need / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free"
            raise OSError(28, text, str(self.partial))

    def _shard(self, number: int, shard: OutputFile) -> list[Problem]:
        """Writes a file and its record; with problems, neither is there."""
        fresh = self.partial / f"{shard.file}.part"
        rows: list[Row] = []
        problems: list[Problem] = []
        try:
            with fresh.open("wb") as file:
                file.write(shard.header)
                for wanted in shard.wanted:
                    source = self._source(wanted)
                    made = recode(self.shards, source, wanted, self.form)
                    rows.append(row(wanted, source, made, shard.file))
                    problems += self._problems(wanted, made.fault, rows[-1])
                    for part in made.made:
                        file.seek(shard.places[part.name].start)
                        file.write(part.data)
                    self.done += self._size(wanted)
                    self._tell(number)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            fresh.unlink(missing_ok=True)
            text = f"{error.strerror or error}; what is complete is kept for the next attempt"
            raise OSError(error.errno, text, error.filename or str(fresh)) from None
        if problems:
            fresh.unlink()
            return problems
        fresh.replace(self.partial / shard.file)
        _write(self._record(shard), lines(rows))
        return []

    def _problems(self, wanted: TensorSpec, fault: str | None, said: Row) -> Iterator[Problem]:
        if fault and not wanted.copy_of:
            yield Problem(fault, wanted.name)
        for part in said["read"]:
            if self.known.get(part["name"], part["sha256"]) != part["sha256"]:
                yield Problem(f"has other bytes than {AUDIT} beside it says", part["name"])


def _asked(shards: Shards, layout: Sequence[OutputFile], form: StorageFormat) -> str:
    """What a conversion reads and writes: only the same one may go on with its files."""
    files = sorted({entry.file for entry in shards.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    entries = [(e.name, e.file.name, e.start) for e in shards.entries.values()]
    headers = hashlib.sha256(b"".join(shard.header for shard in layout)).hexdigest()
    read = hashlib.sha256(repr((stats, entries)).encode()).hexdigest()
    return f"{read} {headers} {form.scale}"


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Locks the folder. The system releases the lock when the process ends."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TargetError(partial, "another conversion is at work there") from None
    finally:
        os.close(descriptor)


def _take_up(partial: Path, asked: str, first: bool) -> None:
    """Begins a folder, or goes on with one of the same conversion.

    One that refuses first values does not go on where they were allowed.
    """
    path = partial / ASKED
    begun = {"asked": asked, "first": False}
    if not all(left.suffix == ".part" for left in partial.iterdir()):
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            begun = {}
    allowed = ({"asked": asked, "first": False}, {"asked": asked, "first": first})
    if begun not in allowed:
        text = "was left by another conversion, or its source has changed: remove it to start again"
        raise TargetError(partial, text)
    _write(path, [json.dumps({"asked": asked, "first": first})])


def _write_audit(partial: Path, rows: Iterator[Row], folder: Path, form: StorageFormat) -> Table:
    """Row by row, as there may be a hundred thousand."""
    about = json.dumps({"from": folder.resolve().name, "fp8": form.fp8, "scales": form.scale})
    table = Table()

    def seen() -> Iterator[Row]:
        for one in rows:
            table.add(one)
            yield one

    _write(partial / AUDIT, [about[:-1], ', "tensors": ', *lines(seen()), "}\n"])
    return table


def _write_index(partial: Path, layout: Sequence[OutputFile]) -> None:
    placed = {name: shard.file for shard in layout for name in shard.places}
    size = sum(place.size for shard in layout for place in shard.places.values())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    _write(partial / INDEX, [json.dumps(index, indent=2), "\n"])


def _write(path: Path, texts: Iterable[str]) -> None:
    """A small file, there whole or not at all."""
    fresh = path.with_name(f"{path.name}.part")
    with fresh.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _hash_of(file: BinaryIO, place: Extent) -> str:
    digest = hashlib.sha256()
    file.seek(place.start)
    left = place.size
    while left > 0:
        data = file.read(min(CHUNK, left))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()
