"""What a family of kernels hands over: a file, the functions that it serves, cases to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

BoundBy = Literal["fp8", "bf16", "memory"]
Init = Literal[
    "normal", "scale", "affinity", "zeros", "ones",
    "ends", "starts", "index", "order", "lengths", "pages", "positions", "bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Arg:
    """An argument of a case: shape, element type as torch names it, and what stands in it.

    `init` tells a GPU run what to put there (`scale` is near 1, `affinity` between 0 and 1);
    `limit` bounds whole numbers (for `ends` the last one, for `index` one more than the largest;
    `starts` are so far apart, `positions` restart after so many). `strides`, if not those of a
    contiguous tensor.
    """

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    init: Init = "normal"
    limit: int = 0
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """One call of a launcher at sizes of the spec.

    `flops` and `bytes` count every input read once and every output written once. `bound_by` says
    what limits it: FP8 or BF16 matrix instructions, or memory. `access` is the least width in bits
    of the widest load and store, in the kernel that is called like the function or `main`.
    `tuning_key` is the entry of `TuningTable` that decided its tile, `size_key` the one that
    decides between this kernel and libraries.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    bound_by: BoundBy = "memory"
    access: int = 128
    spans: tuple[str, ...] = ()
    tuning_key: str = ""
    size_key: str = ""
    main: str = ""


def deduplicate(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Cases of the same name as one, which comes from where all of them do: blocks may ask for the
    same sizes."""
    known: dict[str, Case] = {}
    for case in cases:
        one = known.setdefault(case.name, case)
        spans = tuple(dict.fromkeys((*one.spans, *case.spans)))
        known[case.name] = replace(one, spans=spans)
        assert known[case.name] == replace(case, spans=spans), f"two cases are called {case.name}"
    return tuple(known.values())


@dataclass(frozen=True)
class KernelFile:
    """`kernels/NAME.py`: its text, and the functions that it replaces.

    `serves` maps `F.rms_norm` (`F`, `G`, `fp8`: the modules of `runtime/`) to the element type of
    the first tensor that its launcher takes. `library` names what its functions call, if they
    launch no kernel of dslc; `when` says of a function for which arguments they do.
    """

    name: str
    text: str
    serves: Mapping[str, str]
    cases: tuple[Case, ...]
    library: str = ""
    when: Mapping[str, str] = field(default_factory=dict)


MODULES = {
    "F": "functional",
    "G": "gradients",
    "e5m6": "e5m6",
    "fp8": "fp8",
    "optimizer": "optimizer",
}
"""What `model.py` calls the modules of `runtime/` whose functions kernels replace."""


def write(texts: Mapping[str, str], folder: Path) -> None:
    """The files of `kernels_package` side by side in a folder, to be compiled or run from there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        (folder / Path(path).name).write_text(text, encoding="utf-8")


def of_parts(parts: Sequence[int]) -> str:
    """What the name of a case says of parts in which runs or blocks restart: ` of 96+96`."""
    return f" of {'+'.join(map(str, parts))}" if parts else ""


TORCH = {"bf16": "bfloat16", "f32": "float32", "f8e4m3": "float8_e4m3fn", "i64": "int64"}
"""What torch calls element types."""

SIZES = {
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Bytes of an element."""


def nbytes(*tensors: Arg) -> int:
    """Bytes of tensors, each counted once."""
    total = 0
    for tensor in tensors:
        count = 1
        for size in tensor.shape:
            count *= size
        total += count * SIZES[tensor.dtype]
    return total
