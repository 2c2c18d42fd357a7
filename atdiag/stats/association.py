"""Associations over a handful of units: exact tests, and the smallest p-values that so few units can reach.

Two binary variables: Fisher's exact test (1935), two-sided. With few units this discrete test can't reach a small
p-value whatever the outcome. A test that could not reach the level is not counted among the hypotheses that Holm's
method corrects for (Tarone 1990), since its smallest p-value depends only on the number of units on each side. Facts
that divide the units in the same way are one hypothesis, since nothing here can tell them apart.

Two rankings: Spearman's rank correlation, its p-value from all permutations up to eight units.

Sources: Fisher, J. R. Stat. Soc. 98 (1935). Tarone, Biometrics 46 (1990).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from atdiag.stats.contrasts import holm

LEVEL = 0.05
_EXACT = 8
"""Number of units up to which all permutations are enumerated; beyond it scipy's Student's t approximation is close."""

Kind = Literal["recipe", "architecture"]


@dataclass(frozen=True)
class Fact:
    """A property that a unit has or lacks. Units for which it is unknown are missing."""

    name: str
    kind: Kind
    has: Mapping[str, bool]


@dataclass(frozen=True)
class TestedFact:
    """The test of a fact against the units' outcomes."""

    fact: Fact
    fails: tuple[tuple[str, ...], tuple[str, ...]]
    """Units that fail: those with the fact, those without."""
    gains: tuple[tuple[str, ...], tuple[str, ...]]
    """Units that gain: those with the fact, those without."""
    p: float
    least: float
    """Smallest p-value possible with these numbers of units on each side."""
    adjusted: float | None = None
    """p-value corrected by Holm's method; None if it could not have reached the level and was not counted."""
    same: tuple[Fact, ...] = ()
    """Other facts that divide these units in the same way."""

    @property
    def separates(self) -> bool:
        """Whether all units that fail are on one side, and all that gain on the other."""
        (a, b), (c, d) = self.fails, self.gains
        both = bool(a or b) and bool(c or d)
        return both and ((not a and not d) or (not b and not c))

    @property
    def clear(self) -> bool:
        """Whether the corrected p-value is below the level."""
        return self.adjusted is not None and self.adjusted < LEVEL


def fisher(table: Sequence[Sequence[int]]) -> float:
    """Return the two-sided p-value of a 2 x 2 table: the probability of all tables that are no more likely."""
    return float(stats.fisher_exact(np.asarray(table, np.int64)).pvalue)


def least(fails: int, gains: int, having: int) -> float:
    """Return the smallest p-value possible if ``having`` of ``fails + gains`` units have a fact.

    >>> round(least(4, 7, 4), 4)  # 4 of 11: one table of 330
    0.003
    """
    return min(
        fisher([[both, fails - both], [having - both, gains - having + both]])
        for both in range(max(0, having - gains), min(fails, having) + 1)
    )


def against(facts: Sequence[Fact], outcomes: Mapping[str, str]) -> list[TestedFact]:
    """Test every fact against the outcomes of the units that gain or fail, ignoring other units.

    Holm's correction counts the distinct partitions of the units that could have reached the level.
    """
    found, partitions = [], []
    for fact in facts:
        by: dict[tuple[str, bool], tuple[str, ...]] = {
            (outcome, has): tuple(
                unit for unit, own in outcomes.items() if own == outcome and fact.has.get(unit) is has
            )
            for outcome in ("fails", "gains")
            for has in (True, False)
        }
        fails, gains = (by["fails", True], by["fails", False]), (by["gains", True], by["gains", False])
        table = [list(map(len, fails)), list(map(len, gains))]
        smallest = least(sum(table[0]), sum(table[1]), len(fails[0]) + len(gains[0]))
        found.append(TestedFact(fact, fails, gains, fisher(table), smallest))
        partitions.append(frozenset({frozenset(fails[0] + gains[0]), frozenset(fails[1] + gains[1])}))
    counted = {part: one.p for part, one in zip(partitions, found, strict=True) if one.least < LEVEL}
    adjusted = dict(zip(counted, holm(list(counted.values())), strict=True))
    out = []
    for one, part in zip(found, partitions, strict=True):
        same = [f.fact for f, other in zip(found, partitions, strict=True) if other == part and f is not one]
        constant = frozenset() in part  # facts that all or no units have divide nothing
        out.append(
            TestedFact(
                one.fact, one.fails, one.gains, one.p, one.least, adjusted.get(part), () if constant else tuple(same)
            )
        )
    return out


@dataclass(frozen=True)
class Ranks:
    """A rank correlation. ``least``: the smallest p-value possible with so many units (and these ties)."""

    rho: float
    p: float
    least: float
    units: int


def spearman(x: Sequence[float], y: Sequence[float]) -> Ranks:
    """Return Spearman's rank correlation with a two-sided p-value (twice the smaller tail), exact up to eight units.

    If all values of one variable are equal, rho is 0 and p is 1. Raises ValueError for fewer than 3 units.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"a rank correlation needs at least three pairs, not {len(x)} and {len(y)} values")
    a, b = (stats.rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    if scale == 0:
        return Ranks(0.0, 1.0, 1.0, len(x))
    smallest = min(_p(np.sort(a), np.sort(b)), _p(np.sort(a), np.sort(b)[::-1]))
    return Ranks(float(a @ b) / scale, _p(a, b), smallest, len(x))


def _p(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the p-value for centred ranks."""
    if len(a) > _EXACT:
        return float(stats.spearmanr(a, b).pvalue)

    def product(one: NDArray[np.float64], axis: int = -1) -> Any:
        return np.sum(one * b, axis=axis)

    exact = stats.permutation_test((a,), product, permutation_type="pairings", vectorized=True, n_resamples=10**6)
    return float(exact.pvalue)
