"""Which tensor of a folder each weight of a model is read from, and what stands against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import BLOCK, DTYPES, FP8, Problem, Shards, TensorEntry, dequantize

Shape = tuple[int, ...]
CONSTANT = ".rotary_emb.inv_freq"
SCALE = "_scale_inv"


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor's values come from: an entry, with its scales if it is FP8."""

    entry: TensorEntry
    scale: TensorEntry | None

    def read(self, shards: Shards) -> Tensor:
        value = shards.values(self.entry)
        return value if self.scale is None else dequantize(value, shards.values(self.scale))


class Sources:
    """Matches the tensors of the files with those of a model.

    `of` holds the source of each tensor, and of each copy that the files have; `problems` every
    tensor that is missing, left over, of the wrong shape or type, and copies that differ.
    """

    def __init__(
        self,
        shards: Shards,
        shapes: Mapping[str, Shape],
        copies: Mapping[str, str],
        unread: Collection[str] = (),
    ) -> None:
        """`copies`: copy -> original, of which only the originals are among `shapes`; `unread`:
        tensors of the files that are known to be no part of the model."""
        self.shards = shards
        self.problems = list(shards.problems)
        self.of: dict[str, TensorSource] = {}
        self._left = {n: one for n, one in shards.entries.items() if n not in unread}
        for name, shape in shapes.items():
            self._take(name, shape)
        found = {copy: o for copy, o in copies.items() if copy in self._left}
        for copy, original in found.items():
            self._take(copy, shapes[original])
        self._refuse_the_rest()
        for copy, original in found.items():
            self._compare(copy, original)

    def _take(self, name: str, shape: Shape) -> None:
        entry = self._left.pop(name, None)
        if entry is None:
            if not self.shards.may_hold(name):
                self._refuse("missing", name)
            return
        scale = self._left.pop(f"{name}{SCALE}", None) if entry.dtype == FP8 else None
        if entry.dtype == FP8 and scale is None and self.shards.may_hold(f"{name}{SCALE}"):
            return
        fault = _fault(entry, scale, shape)
        if fault:
            self._refuse(fault, name)
        else:
            self.of[name] = TensorSource(entry, scale)

    def _compare(self, copy: str, original: str) -> None:
        """Refuses a copy that is not equal to its original."""
        if copy not in self.of or original not in self.of:
            return
        a, b = self.of[copy], self.of[original]
        alike = a.scale is None and b.scale is None and a.entry.dtype == b.entry.dtype
        if alike and self.shards.same_bytes(a.entry, b.entry):
            return
        if not _equal(a.read(self.shards), b.read(self.shards)):
            self._refuse(f"differs from {original}, whose copy it should be", copy)

    def _refuse_the_rest(self) -> None:
        for name, entry in self._left.items():
            # Where transformers has 0 shared experts, it saves their weights without an element.
            # Some files hold the frequencies of rotary embedding, which follow from the config.
            constant = 0 in entry.shape or name.endswith(CONSTANT)
            alone = name.endswith(SCALE) and self.shards.may_hold(name.removesuffix(SCALE))
            if not (constant or alone):
                self._refuse("not a tensor of this model", name)

    def _refuse(self, text: str, name: str) -> None:
        self.problems.append(Problem(text, name))


def _fault(entry: TensorEntry, scale: TensorEntry | None, shape: Shape) -> str | None:
    """Why an entry cannot be a weight of this shape, if so."""
    if entry.shape != shape:
        return f"of shape {list(entry.shape)}, the model has {list(shape)}"
    if entry.dtype not in DTYPES:
        return f"stored as {entry.dtype}, which is no weight"
    if entry.dtype != FP8:
        return None
    blocks = tuple(-(-n // BLOCK) for n in shape)
    if len(blocks) != 2 or scale is None:
        return "FP8 without its scales (a matrix NAME_scale_inv)"
    if scale.shape == blocks and scale.dtype in DTYPES and scale.dtype != FP8:
        return None
    return (
        f"its scales (NAME_scale_inv) are {scale.dtype} {list(scale.shape)}, "
        f"expected F32 {list(blocks)} for blocks of {BLOCK} x {BLOCK}"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))
