"""One tensor from the form it is stored in to another: BF16, float32, or FP8 with scales."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fp8 import quantize_weight
from .shards import BLOCK, DTYPES, FP8, Shards, TensorEntry, dequantize, tensor_in
from .sources import TensorSource
from .weights import first_values

SCALE = "_scale_inv"
ROWS = 1 << 22
"""Elements that are converted at once; whole rows of blocks."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint is to hold, and what its values began as: N(value, std^2).

    `dtype` is what it is stored as if not in FP8, by its safetensors name; `fp8` says that FP8
    checkpoints quantize it. A copy has the values of the tensor that it names.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fp8: bool = False
    value: float = 0.0
    std: float = 0.0
    copy_of: str = ""


@dataclass(frozen=True)
class StoredTensor:
    """Bytes of a tensor, as one file has them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytearray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor that was read and converted: a weight, and its scales if they have some.

    `how`: copied, cast, dequantized or quantized. `fault` says what is wrong with its values.
    """

    how: str
    read: tuple[StoredTensor, ...]
    made: tuple[StoredTensor, ...]
    fault: str | None


@dataclass(frozen=True)
class StorageFormat:
    """How weights are to be stored: those of FP8 checkpoints as FP8, or all as they are wanted.

    `scale` is `fp32`, or `ue8m0` for powers of two. With `seed`, weights that still are what this
    seed made of them are at fault; with `first`, first values are no fault at all.
    """

    fp8: bool = False
    scale: str = "fp32"
    seed: int | None = None
    first: bool = False

    def parts(self, wanted: TensorSpec) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of what is stored for a tensor."""
        if not (self.fp8 and wanted.fp8):
            return [(wanted.name, wanted.dtype, wanted.shape)]
        blocks = tuple(-(-n // BLOCK) for n in wanted.shape)
        return [(wanted.name, FP8, wanted.shape), (wanted.name + SCALE, "F32", blocks)]


def recode(
    shards: Shards, source: TensorSource, wanted: TensorSpec, form: StorageFormat
) -> ConvertedTensor:
    """Reads a tensor and stores it as `form` asks, a few rows at a time.

    What is quantized is rounded to `wanted.dtype` first, as weights are while a model computes:
    whether by way of BF16 or not, the same bytes come of it. FP8 that stays FP8 keeps its bytes.
    """
    read = [_read(shards, e) for e in (source.entry, source.scale) if e is not None]
    asked = form.parts(wanted)
    how = _how(read, asked)
    if how == "copied":
        made = [_as(old, *part) for old, part in zip(read, asked, strict=True)]
    else:
        made = [_empty(*part) for part in asked]
    fault = None
    for values, out in zip(_runs(read), _runs(made), strict=True):
        x = values[0] if len(values) == 1 else dequantize(*values)
        w = x.to(DTYPES[wanted.dtype])
        if not (fault or _finite(w)):
            beyond = f"holds numbers too large for {wanted.dtype}"
            fault = beyond if _finite(x) else "holds infinities or NaN"
        if how != "copied":
            new = quantize_weight(w, form.scale) if how == "quantized" else (w,)
            for to, value in zip(out, new, strict=True):
                to.copy_(value)
    fault = fault or (None if form.first else _at_first(read, wanted, form.seed))
    return ConvertedTensor(how, tuple(read), tuple(made), fault)


def _how(read: Sequence[StoredTensor], asked: Sequence[tuple[str, str, tuple[int, ...]]]) -> str:
    if len(read) == len(asked) and read[0].dtype == asked[0][1]:
        return "copied"
    return "quantized" if len(asked) == 2 else "dequantized" if len(read) == 2 else "cast"


def _read(shards: Shards, entry: TensorEntry) -> StoredTensor:
    return StoredTensor(entry.name, entry.dtype, entry.shape, shards.bytes(entry))


def _as(old: StoredTensor, name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    """`old` under another name; only scales may be of another type."""
    if dtype == old.dtype:
        return StoredTensor(name, dtype, shape, old.data)
    new = _empty(name, dtype, shape)
    _tensor(new).copy_(_tensor(old))
    return new


def _empty(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, bytearray(math.prod(shape) * DTYPES[dtype].itemsize))


def _tensor(part: StoredTensor) -> Tensor:
    return tensor_in(part.data, part.dtype, part.shape)


def _runs(parts: list[StoredTensor]) -> Iterator[list[Tensor]]:
    """Views of the same rows of a weight and of its scales; a vector is one run."""
    weight, *scales = (_tensor(part) for part in parts)
    if weight.dim() != 2:
        yield [weight]
        return
    rows = max(1, ROWS // max(1, weight.shape[1]) // BLOCK) * BLOCK
    for start in range(0, weight.shape[0], rows):
        blocks = slice(start // BLOCK, (start + rows) // BLOCK)
        yield [weight[start : start + rows], *(scale[blocks] for scale in scales)]


def _finite(x: Tensor) -> bool:
    least, most = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return bool(least.isfinite() and most.isfinite())


def _at_first(read: list[StoredTensor], wanted: TensorSpec, seed: int | None) -> str | None:
    """Whether a tensor still is what it began as; of random values only the seed can tell."""
    if len(read) != 1 or (wanted.std and seed is None):
        return None
    x = _tensor(read[0])
    if not wanted.std:
        text = f"left at its initial value, {wanted.value:g}"
        return text if bool((x == wanted.value).all()) else None
    assert seed is not None
    name = wanted.copy_of or wanted.name
    first = first_values(name, wanted.shape, wanted.value, wanted.std, seed)
    return "left at its initial values" if torch.equal(x, first.to(x.dtype)) else None
