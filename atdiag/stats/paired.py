"""Differences paired by seed, with Student's t over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
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
