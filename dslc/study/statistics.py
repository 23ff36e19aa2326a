"""Means, intervals and paired tests over seeds, by scipy; a scaling law where sizes vary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

LEVEL = 0.05
"""A difference is significant if its corrected p is below this."""
LEAST_SIZES = 4
"""Points that a law of three constants needs."""


@dataclass(frozen=True)
class Interval:
    """A mean with the 95 % confidence interval by Student's t; no bounds from one value."""

    mean: float
    deviation: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class BaselineComparison:
    """A configuration against the baseline: differences of runs with equal seeds.

    `p` is that of the paired t-test, corrected for the number of comparisons (Holm).
    """

    values: Interval
    difference: Interval | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return ""
        if self.p is None:
            return "one seed: no test"
        if not self.p < LEVEL:
            return "not distinguishable"
        return "lower" if self.difference.mean < 0 else "higher"


@dataclass(frozen=True)
class Law:
    """loss = floor + scale * flops ** -exponent (arXiv 2001.08361, 2203.15556)."""

    floor: float
    scale: float
    exponent: float

    def at(self, flops: float) -> float:
        return float(self.floor + self.scale * flops**-self.exponent)


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value and how sure it is."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean)
    from scipy import stats

    deviation = stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Interval(mean, deviation, mean - half, mean + half)


def compare(
    results: Mapping[str, Mapping[int, float]], baseline: str
) -> dict[str, BaselineComparison]:
    """By configuration: its values by seed against those of the baseline.

    Seeds that only one of the two has are left out of the difference.
    """
    first = results.get(baseline, {})
    found: dict[str, BaselineComparison] = {}
    for name, values in results.items():
        if not values:
            continue
        one = BaselineComparison(interval(list(values.values())))
        seeds = [seed for seed in values if seed in first]
        if name != baseline and seeds:
            differences = [values[seed] - first[seed] for seed in seeds]
            one = replace(one, difference=interval(differences), p=_paired(differences))
        found[name] = one
    return _corrected(found)


def _paired(differences: Sequence[float]) -> float | None:
    """The p of the paired t-test that the mean difference is 0; None for one pair."""
    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _corrected(found: dict[str, BaselineComparison]) -> dict[str, BaselineComparison]:
    """Holm's correction: the smallest p times their number, the next times one less, ..."""
    tested = sorted((one.p, name) for name, one in found.items() if one.p is not None)
    largest = 0.0
    corrected = dict(found)
    for i, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - i)))
        corrected[name] = replace(found[name], p=largest)
    return corrected


def fit_law(points: Sequence[tuple[float, float]]) -> Law | None:
    """The law through (FLOPs, loss), if they are of enough sizes and a law describes them."""
    if len({flops for flops, _ in points}) < LEAST_SIZES:
        return None
    from scipy import optimize

    unit = fmean(flops for flops, _ in points)
    x, y = [flops / unit for flops, _ in points], [loss for _, loss in points]
    try:
        (floor, scale, exponent), _ = optimize.curve_fit(
            lambda c, e, a, b: e + a * c**-b,
            x,
            y,
            p0=(min(y) * 0.9, min(y) * 0.1, 0.3),
            bounds=((0, 0, 0.01), (min(y), math.inf, 3)),
        )
    except (RuntimeError, ValueError):  # no law of this form
        return None
    return Law(float(floor), float(scale * unit**exponent), float(exponent))
