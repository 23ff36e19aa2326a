"""Numbers by name: parameters of the spec, and arguments of the constructors of classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compiler.graph.core import Attr
from compiler.graph.types import Dim

PARAMS = "p"
"""What generated code calls `config.params`."""


@dataclass(frozen=True)
class Sizes:
    """Python expressions of numbers.

    `params` are the parameters of the spec; `own` are dimensions that a class takes as arguments,
    by name, with what its code calls them.
    """

    params: Mapping[str, object]
    own: Mapping[str, str] = field(default_factory=dict)

    def within(self, own: Mapping[str, str]) -> Sizes:
        """The same inside a class with arguments of its own."""
        return replace(self, own=own)

    def of(self, dim: Dim) -> str:
        """The size of a dimension: an argument, the parameter of its name, or the number."""
        if dim.name in self.own:
            return self.own[dim.name]
        return self._named(dim.name, dim.size) or str(dim.size)

    def number(self, name: str, value: Attr) -> str:
        """The value of an attribute: the one parameter that ends in its name and is equal, or it.

        `eps` is `rms_norm_eps`, and `theta` is `rope_theta`.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            return literal(value)
        exact = self._named(name, value)
        if exact:
            return exact
        found = [n for n in self.params if n.endswith(f"_{name}") and self._named(n, value)]
        return f"{PARAMS}.{found[0]}" if len(found) == 1 else literal(value)

    def _named(self, name: str, value: object) -> str:
        known = self.params.get(name)
        numbers = all(isinstance(x, int | float) and type(x) is not bool for x in (known, value))
        return f"{PARAMS}.{name}" if numbers and known == value else ""


def literal(value: Attr) -> str:
    """A number, flag or word as Python text."""
    return f'"{value}"' if isinstance(value, str) else repr(value)
