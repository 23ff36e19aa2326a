"""The numbers of the spec, frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Config:
    """Named values: `config.sequence.eos_token_id` or `config["sequence"]["eos_token_id"]`.

    Immutable and comparable; iterates over its names.
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any]) -> None:
        frozen = {name: freeze(value) for name, value in values.items()}
        object.__setattr__(self, "_values", frozen)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name != "_values" and name in self._values:
            return self._values[name]
        raise AttributeError(f"the config has no {name!r} here")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"the config is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"the config is frozen: cannot delete {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{n}={v!r}" for n, v in self._values.items()) + ")"

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (self._values,)


def freeze(value: Any) -> Any:
    """`value` with mappings made `Config` and lists made tuples, all the way down."""
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def end_tokens(config: Config) -> tuple[int, ...]:
    """The tokens that end a text, `sequence.eos_token_id`; documents end with the first."""
    eos = config.sequence.eos_token_id
    return () if eos is None else eos if isinstance(eos, tuple) else (eos,)


@dataclass(frozen=True)
class Phase:
    """A part of a schedule, up to `until` tokens or `until_step` steps; the last has no end.

    `value` throughout, or at the end if it moves there from `start`, in a line or half a cosine.
    """

    value: float
    until: int | None = None
    until_step: int | None = None
    start: float | None = None
    shape: str = "linear"

    @property
    def end(self) -> int | None:
        return self.until if self.until_step is None else self.until_step

    def at(self, seen: int, begin: int) -> float:
        """The value at `seen`, in the unit of its end, when the phase began at `begin`."""
        if self.start is None or self.end is None:
            return self.value
        done = (seen - begin) / (self.end - begin)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.value - self.start) * done


@dataclass(frozen=True)
class Schedule:
    """A value that depends on how far training is, in tokens or in steps.

    At its end a phase is over: `Schedule((Phase(0.3, until=10 * 10**12), Phase(0.1)))` is 0.3 for
    the first 10T tokens.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases or self.phases[-1].end is not None:
            raise ValueError("the last phase of a schedule has no end")
        if any(phase.end is None for phase in self.phases[:-1]):
            raise ValueError("every phase of a schedule but the last has an end")
        for kind in ("until", "until_step"):
            ends = [end for phase in self.phases if (end := getattr(phase, kind)) is not None]
            if ends != sorted(set(ends)):
                raise ValueError(f"the phases of a schedule must ascend, got {ends}")

    def value_at(self, tokens: int, steps: int = 0) -> float:
        """The value after so many tokens and steps of training."""
        begin = {"tokens": 0, "steps": 0}
        for phase in self.phases:
            unit = "tokens" if phase.until_step is None else "steps"
            seen = tokens if unit == "tokens" else steps
            if phase.end is None or seen < phase.end:
                return phase.at(seen, begin[unit])
            begin[unit] = phase.end
        raise AssertionError("the last phase has no end")
