"""Simulate studies: correctness of arms with known true accuracies, as variable as real runs.

Used to measure the protocol's error rates: how often :func:`atdiag.stats.contrasts.estimate` calls a
difference clear if there is none, and how often it finds a real one.

The model is a probit model with crossed random effects (Searle, Casella & McCulloch 1992; for correctness of items:
Baayen, Davidson & Bates 2008). Arm a with seed s is correct on image i of cluster c if

    threshold_a + cluster_c + image_i + arm_ac + run_as + (run x cluster)_asc + (seed x image)_si + noise_asi > 0

with independent normal terms whose variances sum to 1, so that an arm's accuracy is always Phi(threshold_a).
Two answers whose latent correlation is rho then have covariance Phi2(h, h; rho) - Phi(h)^2, which is inverted to find
each variance from real runs' moments (:func:`moments`): nothing is chosen by hand. Arms with the same seed see the
same batches and initial weights, so they err together on some images: a term (seed x image) without arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from atdiag.stats.contrasts import Estimate, Outcomes


@dataclass(frozen=True)
class Moments:
    """Second moments of correctness in real runs: means over the arms of a contrast."""

    accuracy: float
    """Share of correct answers."""
    same_image: float
    """Covariance of two runs of an arm on the same image."""
    same_cluster: float
    """Covariance of two runs of an arm on two images of a cluster."""
    same_run: float
    """Covariance of one run on two images of a cluster."""
    var_seed: float
    """Seed component of the contrast, points squared, as in :class:`Estimate`."""
    var_cluster: float
    """Cluster component, likewise. 0 if the arms are the same condition."""
    var_residual: float
    """Residual component, likewise."""
    clusters: int
    images: int


def moments(arms: Mapping[str, Outcomes], contrast: Estimate) -> Moments:
    """Return the moments of two arms and of their contrast.

    Raises ValueError for an arm with a single run, or if no cluster has two images.
    """
    if contrast.var_seed is None or contrast.var_residual is None:
        raise ValueError("one seed says nothing about how seeds vary: run at least two")
    accuracy, image, cluster, run = np.mean([_of_arm(arm) for arm in arms.values()], axis=0).tolist()
    return Moments(
        accuracy=accuracy,
        same_image=image,
        same_cluster=cluster,
        same_run=run,
        var_seed=contrast.var_seed,
        var_cluster=contrast.var_cluster,
        var_residual=contrast.var_residual,
        clusters=contrast.clusters,
        images=contrast.images,
    )


def _of_arm(arm: Outcomes) -> tuple[float, float, float, float]:
    right = np.stack(list(arm.correct.values())).astype(float)
    _, index, sizes = np.unique(arm.clusters, return_inverse=True, return_counts=True)
    pairs = float((sizes * (sizes - 1)).sum())
    if len(right) < 2 or not pairs:
        raise ValueError("moments need at least two runs of an arm, and clusters of several images")
    accuracy = right.mean()
    y = right - accuracy
    totals = np.stack([np.bincount(index, weights=row) for row in y])
    # Sums over pairs of runs, and over pairs of images in a cluster: square of the sum minus the sum of squares.
    runs = len(y) * (len(y) - 1)
    image = ((y.sum(0) ** 2).sum() - (y**2).sum()) / (runs * y.shape[1])
    own = (totals**2).sum() - (y**2).sum()
    whole = (totals.sum(0) ** 2).sum() - (y.sum(0) ** 2).sum()
    return float(accuracy), float(image), float((whole - own) / (runs * pairs)), float(own / (len(y) * pairs))


@dataclass(frozen=True)
class Population:
    """The population that studies are drawn from: each random effect's share of the latent variance."""

    cluster: float
    """Difficulty of a cluster for all arms."""
    image: float
    """Difficulty of an image beyond its cluster."""
    arm: float
    """Interaction of arm and cluster."""
    run: float
    """Run as a whole: the effect of the seed on accuracy."""
    run_cluster: float
    """Interaction of run and cluster."""
    together: float
    """Interaction of seed and image, common to all arms."""
    clusters: int
    per_cluster: int

    @staticmethod
    def like(found: Moments) -> Population:
        """Return the population with these moments, with negative variances (from sampling error) set to 0.

        Assumes clusters of average size. Raises ValueError for moments that no such population has.
        """
        p, size = found.accuracy, round(found.images / found.clusters)
        steady = _inverse(p, found.same_cluster)  # shared by cluster and arm
        run = _inverse(p, found.var_seed / 2e4)
        target = found.var_cluster / 2e4

        def excess(arm: float) -> float:
            alone = [_covariance(p, rho) - _covariance(p, max(rho - arm, 0)) for rho in (steady + image, steady)]
            return alone[0] / size + alone[1] * (1 - 1 / size) - target

        image = max(_inverse(p, found.same_image) - steady, 0)
        if excess(steady) < 0:
            raise ValueError("the arms differ between clusters by more than the clusters of any one arm vary")
        arm = float(optimize.brentq(excess, 0, steady)) if target > 0 else 0.0
        run_cluster = max(_inverse(p, found.same_run) - steady - run, 0)
        # The variance of a cluster's score comes from its images, alone and in pairs, minus what the arms share.
        total = (found.var_seed + found.var_cluster + found.var_residual) / 2e4
        pairs = _covariance(p, steady + run + run_cluster) - _covariance(p, steady - arm)
        shared = _inverse(p, p - p**2 - size * (total - (1 - 1 / size) * pairs))
        together = max(shared - (steady - arm) - image, 0)
        if steady + image + run + run_cluster + together > 1:
            raise ValueError(f"the variances of the effects add up to more than the total: {found}")
        return Population(steady - arm, image, arm, run, run_cluster, together, found.clusters, size)

    def study(self, rng: np.random.Generator, accuracies: Mapping[str, float], seeds: int) -> dict[str, Outcomes]:
        """Simulate a study: arms with these true accuracies (shares), this many seeds, and new images."""
        ids = np.repeat(np.arange(self.clusters, dtype=np.int32), self.per_cluster)

        def effect(variance: float, *shape: int) -> NDArray[np.float32]:
            return rng.standard_normal(shape, dtype=np.float32) * np.float32(sqrt(variance))

        arms = len(accuracies)
        noise = 1 - (self.cluster + self.image + self.arm + self.run + self.run_cluster + self.together)
        of_clusters = effect(self.cluster, self.clusters) + effect(self.arm, arms, 1, self.clusters)
        of_clusters = of_clusters + effect(self.run_cluster, arms, seeds, self.clusters)
        latent = of_clusters[..., ids] + effect(self.image, len(ids)) + effect(self.run, arms, seeds, 1)
        latent += effect(self.together, seeds, len(ids)) + effect(noise, arms, seeds, len(ids))
        thresholds = special.ndtri(list(accuracies.values()))[:, None, None]
        return {
            name: Outcomes(dict(enumerate(right)), ids)
            for name, right in zip(accuracies, latent > -thresholds, strict=True)
        }


def tied(study: Mapping[str, Outcomes], seeds: int, rng: np.random.Generator) -> tuple[dict[str, Outcomes], int]:
    """Draw one of the sets of ``seeds`` tied seeds in a study of two arms with many seeds, all sets equally likely.

    Also return the number of such sets (0: the arms then have no seeds). Seeds tie if the difference in right answers
    between the arms is the same for all. Averaged over studies, weighted by the number of sets, results are
    expectations given a tie, which is too rare to wait for.
    """
    one, other = study.values()
    common = list(one.correct)
    lead = np.array([int(one.correct[seed].sum()) - int(other.correct[seed].sum()) for seed in common])
    values, counts = np.unique(lead, return_counts=True)
    sets = [comb(int(count), seeds) for count in counts]
    chosen: list[int] = []
    if total := sum(sets):
        value = rng.choice(values, p=np.array(sets) / total)
        chosen = rng.choice(np.flatnonzero(lead == value), seeds, replace=False).tolist()
    return {
        name: Outcomes({common[i]: arm.correct[common[i]] for i in chosen}, arm.clusters) for name, arm in study.items()
    }, total


def _covariance(p: float, rho: float) -> float:
    """Return the covariance of two answers with chance p each and latent correlation rho (Owen's T; Owen 1956)."""
    return float(p - p**2 - 2 * special.owens_t(special.ndtri(p), sqrt((1 - rho) / (1 + rho))))


def _inverse(p: float, covariance: float) -> float:
    """Return the latent correlation of two answers with this covariance; 0 for a negative one."""
    if covariance <= 0:
        return 0.0
    if covariance >= p - p**2:
        raise ValueError(f"answers of which a share of {p:.3f} is right can't have a covariance of {covariance:.3f}")
    return float(optimize.brentq(lambda rho: _covariance(p, rho) - covariance, 0, 1))
