"""What goes with what, over a handful of units: exact tests, and what so few units could show at all.

Two classes against two classes: Fisher's exact test (1935), two-sided. A discrete test of few units can't reach a small
p-value whatever comes out; one that could not reach the level is not counted among the hypotheses that Holm's method
corrects for (Tarone 1990), since its smallest p-value depends on nothing but how many units are on each side. Facts
that part the units in the same way are one hypothesis, and nothing here tells them from each other.

Two orders: Spearman's rank correlation, its p-value from all permutations up to eight units.

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
"""Units up to which all permutations are looked at; from there on scipy's approximation by Student's t is close."""

Kind = Literal["recipe", "architecture"]


@dataclass(frozen=True)
class Fact:
    """Something that a unit has or has not. Units of which it is not known are missing."""

    name: str
    kind: Kind
    has: Mapping[str, bool]


@dataclass(frozen=True)
class TestedFact:
    """A fact against the units' outcomes."""

    fact: Fact
    fails: tuple[tuple[str, ...], tuple[str, ...]]
    """Units that fail: those that have it, those that have it not."""
    gains: tuple[tuple[str, ...], tuple[str, ...]]
    """Units that gain, likewise."""
    p: float
    least: float
    """The smallest p-value that so many units on each side could reach."""
    adjusted: float | None = None
    """Corrected by Holm's method; None: it could not have reached the level, and was not counted."""
    same: tuple[Fact, ...] = ()
    """Other facts that part these units in the same way."""

    @property
    def separates(self) -> bool:
        """Whether all units that fail are on one side, and all that gain on the other."""
        (a, b), (c, d) = self.fails, self.gains
        both = bool(a or b) and bool(c or d)
        return both and ((not a and not d) or (not b and not c))

    @property
    def clear(self) -> bool:
        """Whether the corrected test is below the level."""
        return self.adjusted is not None and self.adjusted < LEVEL


def fisher(table: Sequence[Sequence[int]]) -> float:
    """Two-sided p-value of a 2 x 2 table: the probability of all tables with its margins that are no likelier."""
    return float(stats.fisher_exact(np.asarray(table, np.int64)).pvalue)


def least(fails: int, gains: int, having: int) -> float:
    """The smallest p-value that ``having`` of ``fails + gains`` units with a fact could reach.

    >>> round(least(4, 7, 4), 4)  # 4 of 11: one table of 330
    0.003
    """
    return min(
        fisher([[both, fails - both], [having - both, gains - having + both]])
        for both in range(max(0, having - gains), min(fails, having) + 1)
    )


def against(facts: Sequence[Fact], outcomes: Mapping[str, str]) -> list[TestedFact]:
    """Every fact against the outcomes of those units that gain or fail; others do not count.

    Holm's correction is over distinct partitions of the units that could have reached the level.
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
        constant = frozenset() in part  # which part nothing
        out.append(
            TestedFact(
                one.fact, one.fails, one.gains, one.p, one.least, adjusted.get(part), () if constant else tuple(same)
            )
        )
    return out


@dataclass(frozen=True)
class Ranks:
    """A rank correlation. ``least``: the smallest p-value that so many units (with these ties) could reach."""

    rho: float
    p: float
    least: float
    units: int


def spearman(x: Sequence[float], y: Sequence[float]) -> Ranks:
    """Spearman's rank correlation with a two-sided p-value (twice the smaller tail), exact up to eight units.

    Without an order in one of the two (all equal) there is none: rho 0, p 1. Raises ValueError for fewer than 3 units.
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
    """Of centred ranks."""
    if len(a) > _EXACT:
        return float(stats.spearmanr(a, b).pvalue)

    def product(one: NDArray[np.float64], axis: int = -1) -> Any:
        return np.sum(one * b, axis=axis)

    exact = stats.permutation_test((a,), product, permutation_type="pairings", vectorized=True, n_resamples=10**6)
    return float(exact.pvalue)
