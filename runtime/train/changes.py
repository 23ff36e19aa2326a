"""Which values of a spec may change during a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config import Config
from .settings import TrainError

FIXED = ("model", "params.", "architecture.", "sequence.", "train.sequence_length", "train.fim")
"""Values that cannot change during a run: the weights or the order of data depend on them."""


def spec_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The values of a spec that changed since a checkpoint was written, one line each.

    Raises TrainError for those that must not.
    """
    names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    lines = [f"{n}: {before.get(n, 'nothing')} -> {now.get(n, 'nothing')}" for n in names]
    fixed = [line for name, line in zip(names, lines, strict=True) if name.startswith(FIXED)]
    if fixed:
        raise TrainError(
            "these values of the spec cannot change during a run; choose another --out:\n  "
            + "\n  ".join(fixed)
        )
    return [f"{line}, from the next step" for line in lines]


def flatten(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """The values of a config by path, as text."""
    if isinstance(value, Config):
        for name in value:
            yield from flatten(f"{path}.{name}" if path else name, value[name])
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from flatten(f"{path}.{index}", item)
    else:
        yield path, str(value)
