"""Types of values: element type and named dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BYTES = {"bf16": 2, "f32": 4, "i32": 4, "i64": 8, "bool": 1}
FLOATS = ("bf16", "f32")

# Dimensions whose size is known only when a program runs.
RUNTIME_DIMS = {
    "batch": "sequences in a batch",
    "seq": "tokens of a sequence that this call works on",
    "context": "tokens of a sequence so far: those in the cache and those of this call",
    "token": "tokens that the router sent to one expert",
    "slot": "tokens times the experts that each chose, in the order of the experts",
}


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dimension. `size` is None for a run-time dimension, which may lack `offset` items."""

    name: str
    size: int | None = None
    offset: int = 0

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.name}={self.size}"
        return f"{self.name}-{self.offset}" if self.offset else self.name

    @property
    def words(self) -> str:
        """As messages name it: `q_lora_rank (1536)`."""
        return f"{self.name} ({self.size})" if self.size is not None else str(self)

    def at(self, sizes: Mapping[str, int]) -> int:
        """Number of items, given the run-time sizes."""
        return self.size if self.size is not None else sizes[self.name] - self.offset


@dataclass(frozen=True, slots=True)
class Type:
    """Element type and dimensions of a tensor."""

    dtype: str
    dims: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]"

    @property
    def words(self) -> str:
        return f"[{', '.join(d.words for d in self.dims)}]"

    def with_dims(self, *dims: Dim) -> Type:
        return Type(self.dtype, dims)

    def with_last(self, *dims: Dim) -> Type:
        """The same type with the last dimension replaced."""
        return Type(self.dtype, (*self.dims[:-1], *dims))

    def with_dtype(self, dtype: str) -> Type:
        return Type(dtype, self.dims)

    @property
    def last(self) -> Dim:
        return self.dims[-1]

    def count(self, sizes: Mapping[str, int] | None = None) -> int:
        """Number of elements; run-time dimensions are looked up in `sizes`."""
        total = 1
        for dim in self.dims:
            total *= dim.at(sizes or {})
        return total

    def bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        return self.count(sizes) * BYTES[self.dtype]
