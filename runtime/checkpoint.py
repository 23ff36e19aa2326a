"""Weights from and to folders of safetensors, under the names that were published."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from .shards import BITS, BLOCK, FP8, INDEX, Entry, LoadError, Problem, Shards, dequantize
from .weights import published

if TYPE_CHECKING:
    from .model import LanguageModel

MAX_SHARD_BYTES = 5_000_000_000
OWN_FILES = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class LoadReport:
    """What `load` did. Every tensor of the model was read: anything else raises."""

    folder: Path
    files: int
    total: int
    """Tensors in the files, scales included."""
    read: int
    """Tensors of the model, all of them."""
    dequantized: int
    """Those of them that were stored in FP8 with scales."""
    aliased: int
    """Copies that the files hold of tensors of the model; compared, and found equal."""
    bytes: int
    """Size of what was read."""
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"read {self.read:,} tensors ({self.bytes / 1e9:.2f} GB) from {self.folder} "
            f"in {self.seconds:.1f} s: none missing, none left over",
            f"  in {self.files} file(s): {self.total:,} tensors",
        ]
        if self.dequantized:
            lines.append(
                f"  dequantized from FP8 with {BLOCK} x {BLOCK} scales: {self.dequantized:,}"
            )
        if self.aliased:
            lines.append(f"  copies of others, compared: {self.aliased:,}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """Where a tensor's values come from: an entry, with its scales if it is FP8."""

    entry: Entry
    scale: Entry | None

    def read(self, shards: Shards) -> Tensor:
        value = shards.values(self.entry)
        return value if self.scale is None else dequantize(value, shards.values(self.scale))


def load(model: LanguageModel, folder: str | Path) -> LoadReport:
    """Reads every weight of `model` from a folder of *.safetensors, with or without an index.

    One tensor at a time, cast to the model's dtype; FP8 tensors are multiplied by their scales. A
    model on the meta device gets its memory, on the CPU. Copies (`model.aliases`) may be absent.

    Raises LoadError with all problems at once, before anything is written: tensors missing, left
    over, of the wrong shape or type, in two files; copies that differ; damaged files.
    """
    began = time.perf_counter()
    folder = Path(folder)
    with Shards(folder) as shards:
        if not shards.entries and shards.problems:
            raise LoadError(folder, shards.problems)
        plan = _Plan(shards)
        sources = {part.name: plan.take(part.name, part.shape) for part in published(model)}
        shapes = {part.name: part.shape for part in published(model)}
        copies = {
            copy: plan.take(copy, shapes[original])
            for copy, original in model.aliases.items()
            if copy in plan.left
        }
        plan.refuse_the_rest()
        for copy, source in copies.items():
            plan.compare(source, sources[model.aliases[copy]])
        if plan.problems:
            raise LoadError(folder, plan.problems)
        if model.device.type == "meta":
            model.to_empty(device="cpu")
        for part in published(model):
            source = sources[part.name]
            assert source is not None  # or there would have been a problem
            part.tensor.copy_(source.read(shards))
        return LoadReport(
            folder=folder,
            files=len({entry.file for entry in shards.entries.values()}),
            total=len(shards.entries),
            read=len(sources),
            dequantized=sum(s is not None and s.scale is not None for s in sources.values()),
            aliased=len(copies),
            bytes=sum(entry.bytes for entry in shards.entries.values()),
            seconds=time.perf_counter() - began,
        )


class _Plan:
    """Matches the tensors of the files with those of a model; what is `left` has no taker yet."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.left = dict(shards.entries)
        self.problems = list(shards.problems)

    def take(self, name: str, shape: tuple[int, ...]) -> Source | None:
        """The source of a tensor of the model; None, and a problem, if there is none that fits."""
        entry = self.left.pop(name, None)
        if entry is None:
            self._refuse("missing", name)
            return None
        scale = self.left.pop(f"{name}_scale_inv", None) if entry.dtype == FP8 else None
        fault = _fault(entry, scale, shape)
        if fault:
            self._refuse(fault, name)
            return None
        return Source(entry, scale)

    def compare(self, copy: Source | None, original: Source | None) -> None:
        """Refuses a copy that is not equal to its original."""
        if copy and original and not _equal(copy.read(self.shards), original.read(self.shards)):
            text = f"differs from {original.entry.name}, whose copy it should be"
            self._refuse(text, copy.entry.name)

    def refuse_the_rest(self) -> None:
        for name, entry in self.left.items():
            # Where transformers has 0 shared experts, it saves their weights without an element.
            if 0 not in entry.shape:
                self._refuse("not a tensor of this model", name)

    def _refuse(self, text: str, name: str) -> None:
        self.problems.append(Problem(text, name))


def _fault(entry: Entry, scale: Entry | None, shape: tuple[int, ...]) -> str | None:
    """Why an entry cannot be a weight of this shape, if so."""
    if entry.shape != shape:
        return f"of shape {list(entry.shape)}, the model has {list(shape)}"
    if entry.dtype not in BITS:
        return f"stored as {entry.dtype}, which is no weight"
    if entry.dtype != FP8:
        return None
    blocks = tuple(-(-n // BLOCK) for n in shape)
    if len(blocks) != 2 or scale is None:
        return "FP8 without its scales (a matrix NAME_scale_inv)"
    if scale.shape == blocks and scale.dtype in BITS and scale.dtype != FP8:
        return None
    return (
        f"its scales (NAME_scale_inv) are {scale.dtype} {list(scale.shape)}, "
        f"expected F32 {list(blocks)} for blocks of {BLOCK} x {BLOCK}"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def save(model: LanguageModel, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the weights and config.json, as transformers reads them.

    One model.safetensors, or several files of at most `max_shard_bytes` (a larger tensor has one
    to itself) and an index. Copies (`model.aliases`) are written out, as in the published
    checkpoint. The folder is written beside and renamed: it is there complete or not at all. It
    may exist if it is empty or holds such files and no others.

    Raises FileExistsError for any other folder, ValueError for a model without weights, OSError
    when it cannot be written.
    """
    if model.device.type == "meta":
        raise ValueError("the model has no weights to save (device='meta'): load some first")
    target = Path(folder).resolve()
    _refuse_to_destroy(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    fresh, old = beside.with_suffix(".new"), beside.with_suffix(".old")
    try:
        fresh.mkdir()
        _write(model, fresh, max_shard_bytes)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _refuse_to_destroy(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a folder to save to")
    names = {path.name for path in target.iterdir()}
    foreign = sorted(name for name in names if not OWN_FILES.fullmatch(name))
    if names and not any(name.endswith(".safetensors") for name in names):
        foreign = sorted(names)
    if foreign:
        listed = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise FileExistsError(
            f"{target} holds files that are no checkpoint of this program ({listed}); "
            f"saving would delete them: choose another folder, or move them away"
        )


def _write(model: LanguageModel, folder: Path, max_shard_bytes: int) -> None:
    shards = list(_split(model, max_shard_bytes))
    single = len(shards) == 1
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if single else file
        values = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        for name in values.keys() & model.aliases.keys():
            # It shares its memory with the original, which safetensors refuses to write.
            values[name] = values[name].clone()
        save_file(values, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(shard, file))
    if not single:
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})
    dtype = str(model.dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in model.hf_config else "torch_dtype"
    _write_json(folder / "config.json", {**model.hf_config, key: dtype})


def _split(model: LanguageModel, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Views of all tensors, copies included, in runs of at most `max_shard_bytes`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _tensors(model):
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    parts = {part.name: part.tensor for part in published(model)}
    yield from parts.items()
    for copy, original in model.aliases.items():
        yield copy, parts[original]


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
