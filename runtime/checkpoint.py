"""Weights from and to folders of safetensors, under the names that were published."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .fp8 import E4M3
from .module import CheckpointModule
from .shards import BLOCK, INDEX, LoadError, Shards
from .sources import Shape, Sources
from .weights import published

MAX_SHARD_BYTES = 5_000_000_000
KEPT = "modules_to_not_convert"
OWN_FILES = re.compile(r"(config|audit)\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


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


def load(
    model: CheckpointModule, folder: str | Path, whole: CheckpointModule | None = None
) -> LoadReport:
    """Reads every weight of `model` from a folder of *.safetensors, with or without an index.

    One tensor at a time, cast to the model's dtype; FP8 tensors are multiplied by their scales. A
    model on the meta device gets its memory, on the CPU. Copies (`model.aliases`) may be absent.
    `whole` is what the folder holds all of, where `model` has some of its experts only.

    Raises LoadError with all problems at once, before anything is written: tensors missing, left
    over, of the wrong shape or type, in two files; copies that differ; damaged files.
    """
    began = time.perf_counter()
    folder = Path(folder)
    shapes = {part.name: part.shape for part in published(whole or model)}
    with matched(folder, shapes, model.aliases) as (shards, sources):
        if model.device.type == "meta":
            model.to_empty(device="cpu")
        for part in published(model):
            source = sources.of[part.name]
            if source.scale is not None and part.dtype is E4M3:
                part.take(shards.values(source.entry), shards.values(source.scale))
            else:
                part.take(source.read(shards))
        return LoadReport(
            folder=folder,
            files=len({entry.file for entry in shards.entries.values()}),
            total=len(shards.entries),
            read=len({part.name for part in published(model)}),
            dequantized=sum(
                sources.of[part.name].scale is not None and part.dtype is not E4M3
                for part in published(model)
            ),
            aliased=len(sources.of) - len(shapes),
            bytes=sum(entry.bytes for entry in shards.entries.values()),
            seconds=time.perf_counter() - began,
        )


@contextmanager
def matched(
    folder: Path, shapes: Mapping[str, Shape], copies: Mapping[str, str]
) -> Iterator[tuple[Shards, Sources]]:
    """The files of a folder, and where in them each tensor of a model is. Raises LoadError."""
    with Shards(folder) as shards:
        if not shards.entries and shards.problems:
            raise LoadError(folder, shards.problems)
        sources = Sources(shards, shapes, copies)
        if sources.problems:
            raise LoadError(folder, sources.problems)
        yield shards, sources


def save(
    model: CheckpointModule, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the weights and config.json, as transformers reads them.

    One model.safetensors, or several files of at most `max_shard_bytes` (a larger tensor has one
    to itself) and an index. Copies (`model.aliases`) are written out, as in the published
    checkpoint. The folder is written under another name and renamed, so that it is complete or
    absent. It may exist if it is empty or holds such files and no others.

    Raises FileExistsError for any other folder, ValueError for a model without weights, OSError
    when it cannot be written.
    """
    if model.device.type == "meta":
        raise ValueError("the model has no weights to save (device='meta'): load some first")
    target = Path(folder).resolve()
    _refuse_to_destroy(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    fresh, old = name.with_suffix(".new"), name.with_suffix(".old")
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


def _write(model: CheckpointModule, folder: Path, max_shard_bytes: int) -> None:
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
    config = {**model.hf_config, key: dtype}
    held = next((p.declaration for p in published(model) if p.scales is not None), None)
    if held is not None:
        # Next to weights in BF16 it is a key of its own.
        kept = {name: config.pop(name) for name in (KEPT,) if name in config}
        config["quantization_config"] = quantization_config(held.fp8) | kept
    _write_json(folder / "config.json", config)


def quantization_config(scale: str) -> dict[str, object]:
    """What config.json says of FP8 weights; which they are is known from their scales."""
    power = {"scale_fmt": "ue8m0"} if scale == "ue8m0" else {}
    size = [BLOCK, BLOCK]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": size,
        "activation_scheme": "dynamic",
        **power,
    }


def _split(model: CheckpointModule, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
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


def _tensors(model: CheckpointModule) -> Iterator[tuple[str, Tensor]]:
    parts: dict[str, Tensor] = {}
    for part in published(model):
        parts[part.name] = part.tensor
        if part.scales is not None:
            parts[f"{part.name}_scale_inv"] = part.scales
    yield from parts.items()
    for copy, original in model.aliases.items():
        yield copy, parts[original]


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
