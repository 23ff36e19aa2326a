"""Numbers as people write them: `14.8T`, `4K`, `80GiB`, `1e-4`. Counts stay exact integers."""

from __future__ import annotations

import re
from fractions import Fraction

# Counts and decimal bytes are powers of 1000; only the IEC units (KiB ...) are powers of 1024.
UNITS = {
    "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

# No count, size or rate of a model comes near; larger ones would only cost time.
MAX_EXPONENT = 30

_NUMBER = re.compile(
    r"(?P<whole>[0-9](?:_?[0-9])*)"
    r"(?:\.(?P<fraction>[0-9](?:_?[0-9])*))?"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,6}))?"
    r"(?P<unit>[A-Za-z]*)"
)


def parse_quantity(text: str) -> int | float:
    """The number that an unsigned literal means.

    Without a point it is an integer where its value is whole (`7168`, `1e13`); with a point it
    is a float (`2.5`), unless a unit makes it a count (`14.8T` is exactly 14800000000000).
    Raises `ValueError` with a sentence for the user.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text}` is not a number")
    unit = match["unit"]
    if unit and unit not in UNITS:
        known = {name.lower(): name for name in UNITS}.get(unit.lower())
        near = f"did you mean `{known}`?" if known else f"the units are {', '.join(UNITS)}"
        raise ValueError(f"unknown unit `{unit}`: {near}")
    whole = match["whole"].replace("_", "")
    fraction = (match["fraction"] or "").replace("_", "")
    exponent = int(match["exponent"] or 0)
    if len(whole.lstrip("0")) + max(exponent, 0) > MAX_EXPONENT + 1:
        raise ValueError(f"`{_shortened(text)}` is larger than 10**{MAX_EXPONENT}")
    if len(fraction) > 2 * MAX_EXPONENT or exponent < -10 * MAX_EXPONENT:
        raise ValueError(f"`{_shortened(text)}` has more digits than a number can hold")
    value = Fraction(int(whole + fraction)) * Fraction(10) ** (exponent - len(fraction))
    value *= UNITS.get(unit, 1)
    if value.denominator == 1 and (unit or not fraction):
        return value.numerator
    return float(value)


def format_count(count: int | float) -> str:
    """A count for people, two decimals at most: 671026419200 is `671.03B`, 4096 is `4.1K`."""
    size = abs(count)
    # 999.995 rounds up to the next unit rather than to `1000.00`.
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if size >= scale * 0.999995:
            return f"{_two_decimals(count / scale)}{unit}"
    return _two_decimals(count)


def _two_decimals(value: int | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if value != int(value) else str(int(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."
