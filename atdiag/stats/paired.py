"""Differences paired by seed, with Student's t over seeds; medians over repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Gap:
    """A mean of differences paired by seed, with Student's t over seeds; images are held fixed."""

    value: float
    low: float
    high: float
    p: float
    seeds: int


def gap(ones: Mapping[Any, float], others: Mapping[Any, float]) -> Gap | None:
    """Compare ``ones`` with ``others`` (first minus second) over their common seeds; None for fewer than two.

    The interval is at 95 %. If all differences are equal it has no width.
    """
    from scipy import stats

    found = [ones[seed] - others[seed] for seed in ones if seed in others]
    if (n := len(found)) < 2:
        return None
    value = sum(found) / n
    se = sqrt(sum((one - value) ** 2 for one in found) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * se
    p = float(2 * stats.t.sf(abs(value) / se, n - 1)) if se > 0 else float(value == 0)
    return Gap(value, value - half, value + half, p, n)


FEWEST_REPEATS = 6
"""The fewest repeats for which two order statistics have a 95 % interval of the median between them."""


@dataclass(frozen=True)
class Median:
    """A median, with an interval of at least 95 % for that of the distribution, whatever its shape."""

    value: float
    low: float
    high: float
    repeats: int


def median_interval(values: Sequence[float]) -> Median:
    """Return the median of independent repeats with its interval between two order statistics.

    The interval from the k-th smallest to the k-th largest of n values misses the distribution's median with the
    probability that a fair coin shows fewer than k heads, or fewer than k tails, in n throws; k is the largest with 5 %
    or less. So outliers, as among times on a machine that does other work, do not move it. Raises ValueError for fewer
    than six values.
    """
    n = len(values)
    if n < FEWEST_REPEATS:
        raise ValueError(f"{n} repeats have no 95 % interval of their median: it takes {FEWEST_REPEATS}")
    ordered, k = sorted(values), 1
    while 2 * sum(comb(n, i) for i in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return Median(median(ordered), ordered[k - 1], ordered[n - k], n)
