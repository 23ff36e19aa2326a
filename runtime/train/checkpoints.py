"""Checkpoints of a run: written to a temporary folder, hashed, renamed; complete or absent.

`checkpoints/step-00001000/` holds `model/`, `optimizer/` and perhaps `ema/`, each of safetensors as
`torch.distributed.checkpoint` writes them for Hugging Face, `state.json` with the numbers, and
`manifest.json` with the hash of every file. DCP's usual format keeps its index as a pickle, which
can run code when it is read; this one has none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..files import sync
from .pieces import Piece, assemble, take
from .ranks import on_rank0
from .settings import TrainError
from .state import State

MANIFEST, VALUES = "manifest.json", "state.json"
NAME = "step-{:08d}"


class Checkpoints:
    """The checkpoints in a folder. The newest `keep` remain; there is one write at a time.

    `group` holds all ranks and is used for nothing else: writes run in the background of training.
    Each rank writes a part of the tensors, rank 0 everything else.
    """

    def __init__(self, folder: Path, keep: int, group: ProcessGroup | None = None) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self._first = group is None or group.rank() == 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: State) -> None:
        """Writes a copy of the state in the background, after the previous write.

        Raises TrainError if that one failed.
        """
        self.wait()
        self._writing = self._pool.submit(self._write, state.copied())

    def wait(self) -> None:
        """Waits for the write. Raises TrainError if it failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits for the write, whether it fails or not. No write can follow."""
        self._pool.shutdown()

    @property
    def failed(self) -> bool:
        """Whether the write has failed; `wait` then raises its error."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        found = self.folder.glob(f"step-*/{MANIFEST}")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def place(self, step: int) -> Path:
        return self.folder / NAME.format(step)

    def newest(self) -> Path | None:
        """The newest checkpoint, verified; None if there is no checkpoint.

        Raises TrainError if it is damaged, naming the newest intact one.
        """
        steps = self.steps()
        if not steps:
            return None
        problem = find_damage(self.place(steps[-1]))
        if problem is None:
            return self.place(steps[-1])
        good = (self.place(s) for s in reversed(steps[:-1]) if find_damage(self.place(s)) is None)
        before = next(good, None)
        help = (
            f"move the folder away to resume from {before}, which is intact"
            if before
            else "no other checkpoint is intact: start again with another --out"
        )
        raise TrainError(f"the checkpoint {self.place(steps[-1])} is damaged: {problem}; {help}")

    def load(self, folder: Path, state: State) -> Mapping[str, Any]:
        """Reads the tensors of a checkpoint into those of `state`; returns its values.

        Raises TrainError for tensors that are missing, or of another shape.
        """
        for name, tensors in state.tensors.items():
            if not (folder / name).is_dir():
                raise TrainError(f"{folder} has no {name}/")
            reader = HuggingFaceStorageReader(str(folder / name))
            try:
                # Of what is sharded whole tensors are read, which are then dropped.
                views = {
                    key: one.values.new_empty(one.shape) if isinstance(one, Piece) else one
                    for key, one in tensors.items()
                }
                with _quiet():
                    # Each rank reads on its own.
                    load(dict(views), storage_reader=reader, no_dist=True)
                for key, one in tensors.items():
                    if isinstance(one, Piece):
                        take(one, views[key])
            except CheckpointException as error:
                reasons = {str(failure[0]) for failure in error.failures.values()}
                raise TrainError(f"{folder / name} does not fit: {'; '.join(reasons)}") from None
        values: Mapping[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        return values

    def _write(self, state: State) -> None:
        place = self.place(state.values["steps"])
        beside = place.with_name(f".{place.name}.new")
        try:
            on_rank0(self.group, lambda: self._make(beside))
            for name, tensors in state.tensors.items():
                self._write_tensors(beside / name, tensors)
            on_rank0(self.group, lambda: self._finish(beside, place, state.values))
        except OSError as error:  # the same on all ranks
            if self._first:
                shutil.rmtree(beside, ignore_errors=True)
            raise TrainError(
                f"cannot write the checkpoint {place}: {error.strerror or error}; "
                f"earlier checkpoints are intact"
            ) from None

    def _make(self, beside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir()

    def _finish(self, beside: Path, place: Path, values: Mapping[str, Any]) -> None:
        (beside / VALUES).write_text(json.dumps(values, indent=2), encoding="utf-8")
        _commit(beside, place)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.place(step))

    def _write_tensors(self, folder: Path, tensors: Mapping[str, Tensor | Piece]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=self.group is not None)
        try:
            with _quiet():
                save(
                    assemble(tensors, self.group),
                    storage_writer=writer,
                    process_group=self.group,
                    no_dist=self.group is None,
                )
        except CheckpointException as error:
            for failure in error.failures.values():
                if isinstance(failure[0], OSError):
                    raise failure[0] from None
            raise


def find_damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        names = {str(name): str(value) for name, value in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    found = dict(_hashes(folder))
    for name in sorted(names.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in names:
            return f"{name} does not belong to it"
        if found[name] != names[name]:
            return f"{name} has changed since it was written"
    return None


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield path.relative_to(folder).as_posix(), digest


def _commit(beside: Path, place: Path) -> None:
    """Renames a complete folder to the checkpoint, durably: it survives a power failure."""
    manifest = json.dumps({"sha256": dict(_hashes(beside))}, indent=2)
    (beside / MANIFEST).write_text(manifest, encoding="utf-8")
    for path in (beside / MANIFEST, beside / VALUES, *(p for p in beside.rglob("*") if p.is_dir())):
        sync(path)
    sync(beside)
    if place.exists():  # of an earlier attempt at the same step
        shutil.rmtree(place)
    beside.rename(place)
    sync(place.parent)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warning of DCP that there is no process group: there is none on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
