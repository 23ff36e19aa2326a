"""Numbers with units."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsl.units import UNITS, format_count, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7168", 7168),
        ("1_000", 1000),
        ("4K", 4000),
        ("14.8T", 14_800_000_000_000),
        ("14.3T", 14_300_000_000_000),
        ("7B", 7_000_000_000),
        ("0.5M", 500_000),
        ("2.5G", 2_500_000_000),
        ("80GiB", 80 * 2**30),
        ("1.5KiB", 1536),
        ("16MB", 16_000_000),
        ("1e13", 10**13),
        ("1e3K", 10**6),
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("1.0", 1.0),
        ("2.0e3", 2000.0),
        ("0.0001K", 0.1),
        ("0", 0),
        ("1e30", 10**30),
    ],
)
def test_value(text: str, value: int | float) -> None:
    result = parse_quantity(text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a number"),
        ("K", "not a number"),
        (".5", "not a number"),
        ("5.", "not a number"),
        ("1__0", "not a number"),
        ("-1", "not a number"),
        ("1e", "unknown unit `e`"),
        ("4k", "did you mean `K`"),
        ("4Gib", "did you mean `GiB`"),
        ("3parsec", "the units are K, M"),
        ("1e31", "larger than 10**30"),
        ("9" * 5000, "larger than 10**30"),
        ("1e999999", "larger than 10**30"),
        ("1e-999999", "more digits"),
        ("0." + "1" * 100, "more digits"),
        ("٣", "not a number"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        parse_quantity(text)
    assert len(str(error.value)) < 120 or reason == "not a number"


@given(st.integers(0, 10**9), st.sampled_from(sorted(UNITS)))
def test_whole_numbers_with_a_unit_are_exact(number: int, unit: str) -> None:
    assert parse_quantity(f"{number}{unit}") == number * UNITS[unit]


@given(st.floats(1e-30, 1e20))
def test_python_floats_are_read_as_python_reads_them(number: float) -> None:
    assert parse_quantity(repr(number)) == number


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (671_026_419_200, "671.03B"),
        (37_552_297_472, "37.55B"),
        (14_800_000_000_000, "14.8T"),
        (70_272, "70.27K"),
        (4096, "4.1K"),
        (999_994, "999.99K"),
        (999_995, "1M"),
        (999, "999"),
        (0, "0"),
        (0.25, "0.25"),
        (-1500, "-1.5K"),
    ],
)
def test_format_count(count: int | float, text: str) -> None:
    assert format_count(count) == text
