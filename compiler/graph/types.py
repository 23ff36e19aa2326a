"""Types of values: element type, named dimensions, and how they are spread over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

BYTES = {"u8": 1, "f8e4m3": 1, "bf16": 2, "f32": 4, "i32": 4, "i64": 8, "bool": 1}
FLOATS = ("bf16", "f32")

# Dimensions whose size is known only when a program runs.
RUNTIME_DIMS = {
    "batch": "sequences in a batch",
    "seq": "tokens of a sequence that this call works on",
    "context": "tokens of a sequence so far: those in the cache and those of this call",
    "token": "tokens that the router sent to one expert",
    "slot": "tokens times the experts that each chose, in the order of the experts",
    "arrived": "tokens that were sent to the experts of this rank",
    "tile": "runs of 128 tokens that share an FP8 scale",
    "slot_tile": "room for the runs of 128 slots of each expert that share an FP8 scale",
}

# Axes of the mesh of ranks along which a tensor may be spread. Pipeline stages are programs of
# their own, so that no tensor is spread over them.
MESH_AXES = {
    "mirror": "the two pipeline ranks that hold a stage under DualPipe",
    "replica": "ranks that hold the same routed experts",
    "expert": "ranks over which the routed experts of a layer lie spread",
}

_AXES = re.compile(r"([a-z_]+)|\(([a-z_]+(?:, ?[a-z_]+)+)\)")
_DIM = re.compile(
    r"([A-Za-z0-9_]+(?:[*+][A-Za-z0-9_]+)*)(?:=([0-9]{1,18})|-([0-9]{1,18}))?(?:@(.*))?"
)
_TYPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]\n]*)\](?: partial\(([a-z_, ]+)\))?")


class Dim(NamedTuple):
    """A named dimension. `size` is None for a run-time dimension, which may lack `offset` items.

    The ranks of `axes` hold parts of their own of it, in the order of the ranks; `size` is that of
    one part.
    """

    name: str
    size: int | None = None
    offset: int = 0
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.name
        if self.size is not None:
            text += f"={self.size}"
        elif self.offset:
            text += f"-{self.offset}"
        return f"{text}@{axes_text(self.axes)}" if self.axes else text

    @property
    def words(self) -> str:
        """As messages name it: `q_lora_rank (1536)`."""
        return f"{self.name} ({self.size})" if self.size is not None else str(self)

    def at(self, sizes: Mapping[str, int]) -> int:
        """Number of items, given the run-time sizes."""
        return self.size if self.size is not None else sizes[self.name] - self.offset


class Type(NamedTuple):
    """Element type and dimensions of a tensor, as one rank holds it.

    The whole is the sum over the ranks of the axes in `partial`.
    """

    dtype: str
    dims: tuple[Dim, ...] = ()
    partial: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _text(self)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh along which ranks hold parts of this tensor."""
        found = [axis for dim in self.dims for axis in dim.axes]
        return ordered(found) if found else ()

    @property
    def words(self) -> str:
        return f"[{', '.join(d.words for d in self.dims)}]"

    @property
    def whole(self) -> Type:
        """The type of a sum of which this one has parts; and that of the parts' gradient."""
        return self._replace(partial=()) if self.partial else self

    def with_dims(self, *dims: Dim) -> Type:
        return self._replace(dims=dims)

    def with_last(self, *dims: Dim) -> Type:
        """The same type with the last dimension replaced."""
        return self._replace(dims=(*self.dims[:-1], *dims))

    def with_partial(self, axes: tuple[str, ...]) -> Type:
        return self._replace(partial=axes) if axes != self.partial else self

    def spread_first(self, axes: tuple[str, ...]) -> Type:
        """The same type with the first dimension spread over ranks."""
        return self.with_dims(self.dims[0]._replace(axes=axes), *self.dims[1:])

    def with_dtype(self, dtype: str) -> Type:
        return self._replace(dtype=dtype)

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


@cache
def _text(type: Type) -> str:
    text = f"{type.dtype}[{', '.join(map(str, type.dims))}]"
    return f"{text} partial({', '.join(type.partial)})" if type.partial else text


def ordered(axes: Iterable[str]) -> tuple[str, ...]:
    """Axes of a mesh, each once, in the order in which ranks are numbered."""
    found = set(axes)
    return (*(a for a in MESH_AXES if a in found), *sorted(found - MESH_AXES.keys()))


def axes_text(axes: tuple[str, ...]) -> str:
    return axes[0] if len(axes) == 1 else f"({', '.join(axes)})"


def parse_type(text: str) -> Type:
    """The type that a text means, `bf16[batch@expert, seq, hidden_size=64] partial(replica)`.

    Raises ValueError with the part that means nothing. Names are for the verifier to check.
    """
    match = _TYPE.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text}` is no type")
    dtype, dims, partial = match.groups()
    # A comma inside of parentheses stands between axes.
    parts = re.split(r",(?![^(]*\))", dims) if dims.strip() else []
    return Type(dtype, tuple(_parse_dim(p.strip()) for p in parts), _words(partial))


def _parse_dim(text: str) -> Dim:
    match = _DIM.fullmatch(text)
    axes = _AXES.fullmatch(match[4]) if match and match[4] is not None else None
    if match is None or (axes is None and match[4] is not None):
        raise ValueError(f"`{text}` is no dimension")
    name, size, offset, _ = match.groups()
    spread = _words(axes[1] or axes[2]) if axes else ()
    return Dim(name, int(size) if size else None, int(offset or 0), spread)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",")) if text else ()
