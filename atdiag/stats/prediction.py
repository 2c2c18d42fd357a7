"""Predict outcomes of units that come in groups, and say how well, by leaving whole groups out.

The model is ridge regression (Hoerl & Kennard 1970) on standardised columns: with Z the standardised measurements and y
the centred outcomes of the training units, the coefficients minimise ``|y - Z b|^2 + penalty |b|^2``. Mean, scale and
penalty come from the training units alone: the penalty is the one of :data:`PENALTIES` with the least squared error,
a mean over groups, when the groups of the training units are left out one by one (nested cross-validation: Varma &
Simon 2006). Scikit-learn's ``GridSearchCV`` over a pipeline does the same, and the tests hold the two together; here
one decomposition (SVD) serves all penalties, so that the procedure itself can be simulated.

Units of one group are not independent, so intervals resample whole groups (Davison & Hinkley 1997, section 3.8), with
the predictions held fixed: percentiles.

Sources: Davison & Hinkley, Bootstrap Methods and their Application (1997). Hoerl & Kennard, Technometrics 12 (1970).
Varma & Simon, BMC Bioinformatics 7 (2006).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTIES = tuple(float(10 ** (half / 2)) for half in range(-2, 7))
"""From 0.1 to 1,000, a factor of 10^0.5 apart."""


@dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression."""

    penalty: float
    mean: Floats
    """Of each measurement over the training units, [p]."""
    scale: Floats
    """Their standard deviations, [p]; 1 for a measurement without any."""
    level: float
    """Mean outcome of the training units."""
    weights: Floats
    """What one standard deviation of each measurement adds to the outcome, [p]."""

    def __call__(self, x: Floats) -> Floats:
        """Return the predicted outcomes [n] of measurements [n, p]."""
        out: Floats = self.level + (x - self.mean) / self.scale @ self.weights
        return out


def path(x: Floats, y: Floats, penalties: Sequence[float] = PENALTIES) -> list[Ridge]:
    """Fit a ridge regression of outcomes y [n] on measurements x [n, p] for each penalty, above 0.

    Raises ValueError for shapes that do not match, numbers that are not finite, and penalties that are not above 0.
    """
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"measurements [n, p] and outcomes [n] are of shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("measurements and outcomes must be finite")
    if not all(penalty > 0 for penalty in penalties):
        raise ValueError(f"penalties must be above 0, not {list(penalties)}")
    mean, scale, level = x.mean(0), x.std(0), float(y.mean())
    # A column that is constant up to rounding would be blown up to noise.
    scale = np.where(scale > 1e-12 * np.abs(x).max(0), scale, 1.0)
    u, singular, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    along = u.T @ (y - level)
    return [
        Ridge(penalty, mean, scale, level, (singular / (singular**2 + penalty) * along) @ vt) for penalty in penalties
    ]


def left_out(groups: Sequence[Hashable]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield, for each group in the order in which it first occurs, which units [n] to train on, and which are left out.

    Raises ValueError for fewer than two groups.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError("nothing is left to train on without the only group")
    for name in names:
        out = np.array([one == name for one in groups])
        yield ~out, out


def ridge(x: Floats, y: Floats, groups: Sequence[Hashable]) -> Ridge:
    """Fit a ridge regression whose penalty is chosen by leaving out groups; of equally good ones the largest.

    Raises ValueError as :func:`path` and :func:`left_out` do, and for another number of groups than of units.
    """
    if len(groups) != len(y):
        raise ValueError(f"{len(y)} units have {len(groups)} groups")
    errors = [
        [float(np.square(fitted(x[out]) - y[out]).mean()) for fitted in path(x[kept], y[kept])]
        for kept, out in left_out(groups)
    ]
    means = np.mean(errors, 0)
    best = max(i for i, error in enumerate(means) if error <= means.min())
    return path(x, y, PENALTIES[best : best + 1])[0]


def held_out(x: Floats, y: Floats, groups: Sequence[Hashable], inner: Sequence[Hashable] | None = None) -> Floats:
    """Return each unit's prediction [n] by a model that was fitted without its group.

    inner: the groups by which penalties are chosen among the other units, if they are not ``groups``. Raises ValueError
    as :func:`ridge` does.
    """
    inner = groups if inner is None else inner
    predicted = np.full(len(y), np.nan)
    for kept, out in left_out(groups):
        predicted[out] = ridge(x[kept], y[kept], [name for name, keep in zip(inner, kept, strict=True) if keep])(x[out])
    return predicted


# --- how good predictions are --------------------------------------------------------------------------------------


def rank_correlation(predicted: Floats, measured: Floats, strata: Sequence[Hashable]) -> float:
    """Return Spearman's correlation of predictions with outcomes within each stratum, a mean over strata.

    It is 0 in a stratum where either has no two different values, such as with a single unit. Cross-validated
    predictions carry the mean outcome of the units they were fitted to, which is low where the units left out are high:
    for a model that learns nothing this lies below 0, near -1 if each is predicted by that mean alone.
    """
    numbers = {name: i for i, name in enumerate(dict.fromkeys(strata))}
    of = np.array([numbers[name] for name in strata])
    return float(np.mean([_spearman(predicted[of == i], measured[of == i]) for i in numbers.values()]))


def _spearman(a: Floats, b: Floats) -> float:
    a, b = _centred_ranks(a), _centred_ranks(b)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def _centred_ranks(values: Floats) -> Floats:
    """Return ranks, equal values sharing their mean, minus their mean: scipy's are ten times as slow on few values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2
    return ranks


def sign_agreement(predicted: Floats, measured: Floats, known: NDArray[np.bool_]) -> float:
    """Return the share of units [n] whose predicted sign is right, among those whose sign is known; 0 if none is."""
    return float((np.sign(predicted) == np.sign(measured))[known].mean()) if known.any() else 0.0


@dataclass(frozen=True)
class Between:
    """A statistic with its bootstrap interval."""

    value: float
    low: float
    high: float


def resampled(
    statistic: Callable[[NDArray[np.int64]], Sequence[float]],
    groups: Sequence[Hashable],
    generator: np.random.Generator,
    level: float = 0.95,
    resamples: int = 10_000,
) -> list[Between]:
    """Return statistics of all units, each with the percentile interval over resamplings of whole groups.

    statistic: indices of units, possibly repeated -> values. As many groups are drawn as there are, with replacement.
    """
    members: dict[Hashable, list[int]] = {}
    for i, name in enumerate(groups):
        members.setdefault(name, []).append(i)
    units = [np.array(some, np.int64) for some in members.values()]
    draws = generator.integers(len(units), size=(resamples, len(units)))
    found: NDArray[Any] = np.array([statistic(np.concatenate([units[i] for i in drawn])) for drawn in draws])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    every = statistic(np.arange(len(groups)))
    return [Between(float(value), float(a), float(b)) for value, a, b in zip(every, low, high, strict=True)]
