"""What the pages share: templates that escape everything, and how numbers are written."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from dsl.units import format_count

_PREFIXES = (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))


@cache
def environment() -> Environment:
    """Everything is escaped: the texts of a spec are not ours."""
    environment = Environment(
        loader=PackageLoader("backends", "report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": format_count, "exact": "{:,}".format, "quantity": quantity}
    return environment


def quantity(number: int, unit: str) -> str:
    """A number with a decimal prefix: 250449887232 of FLOP is `250.45 GFLOP`."""
    for prefix, scale in _PREFIXES:
        if number >= scale:
            return f"{number / scale:.2f} {prefix}{unit}"
    return f"{number} {unit}"
