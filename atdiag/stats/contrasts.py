"""Contrasts: linear combinations of arms in top-1 points, with intervals that cover seeds *and* test images.

Every arm is measured with the same seeds on the same images, so seeds and images are crossed random factors (Baayen,
Davidson & Bates 2008; Owen 2007). Test scenes that share a source digit are not independent: clusters of images take
the place of images. With ``d[s, i] = 100 * sum_a weight_a * correct_a[s, i]`` averaged over clusters, S seeds and C
clusters, the balanced two-way analysis of variance (Searle, Casella & McCulloch 1992, ch. 4) gives the mean squares
MS_S, MS_C and MS_E, and

    Var(mean) = (MS_S + max(MS_C - MS_E, 0)) / (S C)

which is two-way clustering (Cameron, Gelbach & Miller 2011) with a non-negative image component.
The interval takes Student's t with Satterthwaite's (1946) degrees of freedom nu, shrunk towards their lower bound m
when there are few seeds: ``df = m (nu / m) ** min(1, m / 4)``, ``m = min(S, C) - 1``. With five or more seeds df = nu.
Beyond 95 %, and for p-values below 0.05, it shrinks further: ``m (df / m) ** (log 0.05 / log alpha) ** 2``.

Why shrink: with 2 degrees of freedom MS_S is sometimes far too small, and exactly then nu is far too large (the known
weakness of Welch's test below 5 df: Best & Rayner 1987). False alarms at 95 % with 3 seeds and 599 clusters, over a
grid of variance components that includes no seed or no image effect (normal theory, 200,000 studies each):
unconstrained MS_S + MS_C - MS_E with nu 2.0-7.7 %; with MS_C - MS_E >= 0 and nu 5.0-7.7; with S - 1 df 0.0-4.8; images
alone where MS_S < MS_E 3.2-7.5; MS_S >= MS_E enforced 1.7-7.5; Cochran & Cox 2.9-5.0; seeds alone 4.9-16.4; **as
shipped 3.5-5.8** (2 seeds, without the rule below: 0.8-6.2, nu 12.7; 5 seeds: 4.9-5.8). On simulated right and wrong
answers, 2,000 studies for each of 13 settings, 4.2-6.6 (tests/stats).

Why further beyond 95 %: Holm's method needs p-values down to 0.05 / m for m contrasts, where one df for all levels is
wrong by a growing factor. Largest rate over the grid as a multiple of the nominal 5, 1, 0.5 and 0.1 % with 2, 3, 5 and
8 seeds: one df for all levels 1.2, 2.8, 4.2, 12; 1.2, 2.1, 2.9, 7.3; 1.2, 1.8, 2.3, 4.8; 1.1, 1.3, 1.4, 2.1; **as
shipped at most 1.25, with any** (at a cost in power: 3 seeds reach small p-values for large effects only). Simulated
with the variance of real runs, 3 seeds, 12 distilled arms against one baseline: some false alarm in 15 % of studies
with one df, in 3 % as shipped (benchmarks/false_alarms.py).

Two seeds: one difference between them says next to nothing about MS_S, and where it is 0 by chance the interval above
ignores seeds and rests on few images. There the variance is MS_C / (S C) at least (that of images whose seeds are
averaged), and no contrast is clear: verdicts begin at three seeds. In simulations that vary like real runs (four
settings, 2,396 and 200 images, benchmarks/results/false_alarms_ties.json), the interval of arms that do not differ
excludes zero with 2 seeds in 0.0-0.2 % of studies, with 3 in 3.0-6.1, with 5 in 4.7-6.3. As a diagnostic, only among
studies whose seeds have exactly equal accuracies: 0.0-0.6, 14-57 and 12-60 %. So an interval is still far too narrow
where three seeds or more tie, which is rare enough not to show in the rate over all studies; the rule for them holds
that rate, and is left as it is.

Sources: Baayen, Davidson & Bates, J. Mem. Lang. 59 (2008). Best & Rayner, Technometrics 29 (1987). Cameron, Gelbach &
Miller, J. Bus. Econ. Stat. 29 (2011). Holm, Scand. J. Stat. 6 (1979). Owen, Ann. Appl. Stat. 1 (2007). Satterthwaite,
Biometrics Bull. 2 (1946). Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987). Searle, Casella & McCulloch, Variance
Components (1992).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

FEWEST_SEEDS = 3
"""Minimum number of seeds for a verdict: two say too little about how seeds vary (see above)."""


Scale = Literal["points", "log-odds"]


@dataclass(frozen=True)
class Outcomes:
    """The correctness of one arm on the n test images. Raises ValueError for shapes that do not match."""

    correct: Mapping[Any, NDArray[np.bool_]]
    """Seed -> bool [n]. Seeds are any hashable values; equal seeds of two arms are paired."""
    clusters: NDArray[np.int32]
    """Cluster of each image, [n]: images in the same cluster are not independent."""

    def __post_init__(self) -> None:
        if self.clusters.ndim != 1 or not len(self.clusters):
            raise ValueError(f"clusters must be one number for each image, not of shape {self.clusters.shape}")
        for seed, correct in self.correct.items():
            if correct.dtype != np.bool_ or correct.shape != self.clusters.shape:
                raise ValueError(
                    f"seed {seed}: correct must be bool of shape {self.clusters.shape}, "
                    f"not {correct.dtype} of shape {correct.shape}"
                )


@dataclass(frozen=True)
class Estimate:
    """A contrast in top-1 points (or in log-odds) with its uncertainty."""

    value: float
    low: float
    high: float
    level: float
    """Confidence level of the interval from ``low`` to ``high``, such as 0.95."""
    p: float
    """Two-sided p-value for ``value`` = 0."""
    seeds: int
    images: int
    clusters: int
    df: float
    se: float
    covers: Literal["seeds and images", "images only"]
    """An interval from a single seed covers images only."""
    var_seed: float | None
    """Variance component of seeds, points squared, truncated at 0. None (unknown) with one seed."""
    var_cluster: float
    """Variance component of clusters; with one seed, of clusters and the residual together."""
    var_residual: float | None
    """Residual variance of one cluster with one seed. None with one seed."""
    adjusted: float | None = None
    """``p`` corrected for the number of contrasts tested together (:func:`holm`); None if tested alone."""
    within: float | None = None
    """The margin, in points, within which it was found to be equivalent to 0; None: not found, or not tested."""
    undertrained: bool = False
    """Whether the study's baseline is so near chance that no contrast is informative."""
    scale: Scale = "points"
    """In what it is measured: value, interval, ``se`` and variance components."""

    @property
    def digits(self) -> int:
        """How many decimals it is shown with: one of points, two of log-odds."""
        return 1 if self.scale == "points" else 2

    @property
    def decides(self) -> bool:
        """Whether it may have a verdict at all: from three seeds on, unless the baseline is near chance."""
        return self.seeds >= FEWEST_SEEDS and not self.undertrained

    @property
    def clear(self) -> bool:
        """Whether the sign is settled: it may have a verdict, its interval excludes zero, and so does the corrected
        test where the contrast was read among others."""
        apart = self.low > 0 or self.high < 0
        corrected = self.adjusted is None or self.adjusted < 1 - self.level
        return self.decides and apart and corrected

    def interval(self, level: float) -> tuple[float, float]:
        """Return the interval at another level. Raises ValueError unless 0 < level < 1."""
        return _interval(self.value, self.se, self.df, self.least_df, level)

    @property
    def least_df(self) -> float:
        """``df`` if all variance came from seeds; with one seed ``df`` itself."""
        return min(self.seeds, self.clusters) - 1 or self.df


def estimate(
    arms: Mapping[str, Outcomes], weights: Mapping[str, float], level: float = 0.95, scale: Scale = "points"
) -> Estimate:
    """Estimate the contrast ``sum_a weights[a] * accuracy(a)``, over the seeds that all its arms share.

    ``{"copy": 1, "scratch": -1}`` is a difference, ``{"a": 1, "b": -1, "c": -1, "d": 1}`` a difference of differences,
    ``{"copy": 1}`` one arm's accuracy. Arms of weight 0 are ignored. If all clusters score alike in all seeds (an arm
    minus itself, an arm without errors) the variance is 0 and the interval has no width.

    scale: ``log-odds`` estimates ``sum_a weights[a] * log(accuracy(a) / (1 - accuracy(a)))``, natural logarithm, with
    the variance of its linearisation (the delta method): an arm's answers count ``1 / (accuracy (1 - accuracy))`` fold.
    An accuracy counts as half an image away from 0 and from 1 at least.

    Raises ValueError for an unknown arm, no arm, arms that share no seed or were measured on different images, and
    images that all belong to one cluster.
    """
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if unknown := [name for name in used if name not in arms]:
        raise ValueError(f"no arm named {', '.join(map(repr, unknown))} among {', '.join(map(repr, arms))}")
    if not used or not all(isfinite(weight) for weight in used.values()):
        raise ValueError(f"a contrast needs finite weights, not all of them 0: {dict(weights)}")
    chosen = {name: arms[name] for name in used}
    first = next(iter(chosen.values()))
    for name, arm in chosen.items():
        if not np.array_equal(arm.clusters, first.clusters):
            raise ValueError(f"arms {next(iter(chosen))!r} and {name!r} were not measured on the same images")
    common = [seed for seed in first.correct if all(seed in arm.correct for arm in chosen.values())]
    if not common:
        have = "; ".join(f"{name!r}: {', '.join(map(str, arm.correct)) or 'none'}" for name, arm in chosen.items())
        raise ValueError(f"these arms have no seed in common, so nothing can be paired ({have})")

    points = np.zeros((len(common), len(first.clusters)))
    for name, arm in chosen.items():
        points += used[name] * _scored(np.stack([arm.correct[seed] for seed in common]), scale)
    points = points.round(9)  # weights such as 0.1 + 0.2 - 0.3 leave a rounding error of 1e-15, which is no effect
    scores = _cluster_scores(points, first.clusters)
    seeds, clusters = scores.shape
    if clusters < 2:
        raise ValueError("all images belong to one cluster, so nothing can be said about other images")

    value = float(points.mean())
    var_seed: float | None = None
    var_residual: float | None = None
    if seeds == 1:
        var_cluster = float(scores.var(ddof=1))
        variance, df, least = var_cluster / clusters, clusters - 1.0, clusters - 1.0
    else:
        ms_seed, ms_cluster, ms_residual = _mean_squares(scores)
        var_seed, var_residual = max(ms_seed - ms_residual, 0) / clusters, ms_residual
        var_cluster = max(ms_cluster - ms_residual, 0) / seeds
        if ms_seed + seeds * var_cluster < 1e-9 * ms_residual:
            ms_seed = ms_residual  # exact ties between seeds are chance: the expectation of MS_S is at least MS_E
        if seeds == 2:  # the sum with the images' part is then at least MS_C, whatever the one difference of seeds
            ms_seed = max(ms_seed, min(ms_cluster, ms_residual))
        of_seeds, of_clusters = ms_seed / (seeds * clusters), var_cluster / clusters
        variance, df = of_seeds + of_clusters, _degrees(of_seeds, of_clusters, seeds, clusters)
        least = min(seeds, clusters) - 1.0
    se = sqrt(variance)
    low, high = _interval(value, se, df, least, level)
    return Estimate(
        value=value,
        low=low,
        high=high,
        level=level,
        p=_p_value(abs(value) / se, df, least) if se > 0 else float(value == 0),
        seeds=seeds,
        images=len(first.clusters),
        clusters=clusters,
        df=df,
        se=se,
        covers="images only" if seeds == 1 else "seeds and images",
        var_seed=var_seed,
        var_cluster=var_cluster,
        var_residual=var_residual,
        scale=scale,
    )


def _scored(correct: NDArray[np.bool_], scale: Scale) -> NDArray[np.float64]:
    """Convert right and wrong answers [S, n] to scores [S, n] whose mean is their accuracy on the scale."""
    if scale == "points":
        return correct * np.float64(100)
    half = 0.5 / correct.size
    share = min(max(float(correct.mean()), half), 1 - half)
    scores: NDArray[np.float64] = log(share / (1 - share)) + (correct - correct.mean()) / (share * (1 - share))
    return scores


def _cluster_scores(points: NDArray[np.float64], clusters: NDArray[np.int32]) -> NDArray[np.float64]:
    """Convert images [S, n] to cluster scores [S, C] whose mean over clusters equals the mean over images.

    For clusters of equal size these are the cluster means; otherwise the mean's linearisation as a ratio of totals
    (Cochran 1977, Sampling Techniques, ch. 6), about each seed's own mean, so that seeds do not leak into MS_E.
    """
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    means = points.mean(axis=1, keepdims=True)
    totals = np.stack([np.bincount(index, weights=row, minlength=len(sizes)) for row in points])
    scores: NDArray[np.float64] = means + (totals - means * sizes) / sizes.mean()
    return scores


def _mean_squares(scores: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return MS_S, MS_C and MS_E of scores [S, C], S and C at least 2."""
    seeds, clusters = scores.shape
    by_seed, by_cluster = scores.mean(axis=1, keepdims=True), scores.mean(axis=0, keepdims=True)
    residual = scores - by_seed - by_cluster + scores.mean()
    return (
        float(clusters * by_seed.var(ddof=1)),
        float(seeds * by_cluster.var(ddof=1)),
        float(np.square(residual).sum() / ((seeds - 1) * (clusters - 1))),
    )


def _degrees(of_seeds: float, of_clusters: float, seeds: int, clusters: int) -> float:
    """Return the degrees of freedom of the sum of two variance terms, by the module's rule."""
    least = min(seeds, clusters) - 1
    squares = of_seeds**2 / (seeds - 1) + of_clusters**2 / (clusters - 1)
    satterthwaite = (of_seeds + of_clusters) ** 2 / squares if squares > 0 else least
    return float(least * (satterthwaite / least) ** min(1, least / 4))


def _degrees_at(alpha: float, df: float, least: float) -> float:
    """Return the degrees of freedom for a two-sided test at level alpha, by the module's rule."""
    further = min(1.0, log(0.05) / log(alpha)) ** 2
    degrees: float = least * (df / least) ** further
    return degrees


def _interval(value: float, se: float, df: float, least: float, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not {level}")
    half = float(special.stdtrit(_degrees_at(1 - level, df, least), (1 + level) / 2)) * se
    return value - half, value + half


def _p_value(t: float, df: float, least: float) -> float:
    """Return the level alpha of the interval that just reaches zero, t standard errors away."""

    def of(log_alpha: float) -> float:
        return _log_tail(t, _degrees_at(exp(log_alpha), df, least)) + log(2) - log_alpha

    most, fewest = (_log_tail(t, d) + log(2) for d in (df, least))
    if most >= log(0.05) or fewest - most < 1e-9:
        return exp(most)
    # With many degrees of freedom the tail is 0 beyond t = 40 or so; a smaller level than exp(-700) would be 0.
    lowest = max(most, -700.0)
    return exp(float(optimize.brentq(of, lowest, min(fewest, log(0.05)))) if of(lowest) > 0 else lowest)


def _log_tail(t: float, df: float) -> float:
    """Return log P(T > t) of Student's t; -inf where that underflows.

    The function that ``scipy.stats.t`` calls, without the checks of a distribution, which take 99 % of its time.
    """
    tail = float(special.stdtr(df, -t))
    return log(tail) if tail > 0 else -inf


def one_sided(estimate: Estimate, side: Literal["above", "below"], bound: float = 0.0) -> float:
    """Return the p-value of the hypothesis that the true contrast is *not* above (below) a bound, in points.

    A small one says that it is. At the bound 0 it is half the two-sided ``p`` on the side of the estimate. Without any
    variance it is 0 or 1. Half of :meth:`Estimate.interval` at level 1 - 2 p ends at the bound, so test and interval
    agree.
    """
    distance = estimate.value - bound if side == "above" else bound - estimate.value
    if estimate.se == 0:
        return float(distance <= 0)
    half = _p_value(abs(distance) / estimate.se, estimate.df, estimate.least_df) / 2
    return half if distance > 0 else 1 - half


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing by Holm's step-down method, keeping their order.

    Raises ValueError where one is not in [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie in [0, 1]: {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def seeds_needed(estimate: Estimate, power: float = 0.8, most: int = 1000) -> int | None:
    """Return the total number of seeds that would make the contrast clear with this power; None if above ``most``.

    Assumes that the contrast and its variance components are as estimated; more seeds do not enlarge the test set, so
    there may be no such number. It is the smallest S with ``|value| >= (t(level) + t(power)) * se(S)``, the usual
    approximation to noncentral t (slightly too large if the answer is below 5). With 3 seeds the components themselves
    are uncertain by a factor of two or more, so take it as an order of magnitude.

    Raises ValueError for an estimate from one seed, which says nothing about seeds, and for a power outside [0.5, 1).
    """
    if estimate.var_seed is None or estimate.var_residual is None:
        raise ValueError("one seed says nothing about how seeds vary: run at least two")
    if not 0.5 <= power < 1:
        raise ValueError(f"power lies in [0.5, 1), not {power}")
    if estimate.value == 0:
        return None
    clusters, of_clusters = estimate.clusters, estimate.var_cluster / estimate.clusters
    per_seed = estimate.var_seed + estimate.var_residual / clusters

    def settles(seeds: int) -> bool:
        of_seeds = per_seed / seeds
        df = _degrees(of_seeds, of_clusters, seeds, clusters)
        strict = _degrees_at(1 - estimate.level, df, min(seeds, clusters) - 1)
        quantiles = special.stdtrit([strict, df], [(1 + estimate.level) / 2, power])
        return bool(abs(estimate.value) >= quantiles.sum() * sqrt(of_seeds + of_clusters))

    numbers = range(FEWEST_SEEDS, most + 1)
    found = bisect_left(numbers, True, key=settles)
    return numbers[found] if found < len(numbers) else None


def equivalent(estimate: Estimate, margin: float) -> bool:
    """Return whether the contrast is within ``margin`` points of 0, by two one-sided 5 % tests (Schuirmann 1987).

    That is: its 90 % interval lies inside. Never true for a contrast that may have no verdict
    (:attr:`Estimate.decides`). Raises ValueError unless the margin is positive.
    """
    if not margin > 0:
        raise ValueError(f"the margin of equivalence is a positive number of points, not {margin}")
    low, high = estimate.interval(0.90)
    return estimate.decides and -margin < low and high < margin
