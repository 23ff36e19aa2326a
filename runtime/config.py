"""The numbers of the spec, frozen."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Schedule:
    """A value that depends on the number of tokens trained on.

    `phases` are (until, value) in ascending order; the last one's `until` is None. A phase ends
    before its `until`: `Schedule(((10 * 10**12, 0.3), (None, 0.1)))` is 0.3 for the first 10T.
    """

    phases: tuple[tuple[int | None, float], ...]

    def __post_init__(self) -> None:
        ends = [until for until, _ in self.phases]
        known = [until for until in ends[:-1] if until is not None]
        if not ends or ends[-1] is not None or len(known) != len(ends) - 1:
            raise ValueError("every phase of a schedule but the last has an `until`")
        if known != sorted(set(known)):
            raise ValueError(f"the phases of a schedule must ascend, got {known}")

    def value_at(self, tokens: int) -> float:
        """The value once `tokens` tokens were trained on."""
        return next(v for until, v in self.phases if until is None or tokens < until)
