"""Simulated studies against brute force, the bivariate normal, and the moments they are made from."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest
from scipy import stats

from atdiag.stats import simulation
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.stats.simulation import Moments, Population, moments

DIFFERENCE = {"a": 1.0, "b": -1.0}
LIKE = Moments(
    accuracy=0.52, same_image=0.113, same_cluster=0.037, same_run=0.048, var_seed=9.6, var_cluster=188.0,
    var_residual=736.0, clusters=599, images=2396,
)  # fmt: skip


def test_moments_by_brute_force():
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(9, dtype=np.int32), rng.integers(1, 5, 9)))
    hard = rng.normal(size=9)[ids]
    arms = {n: Outcomes({s: rng.normal(size=ids.size) > hard for s in range(3)}, ids) for n in "ab"}
    expected = []
    for arm in arms.values():
        p = np.mean(list(arm.correct.values()))
        y = {s: right - p for s, right in arm.correct.items()}
        n = range(len(ids))
        mates = [(i, j) for i in n for j in n if i != j and ids[i] == ids[j]]
        runs = [(s, u) for s in y for u in y if s != u]
        expected.append(
            [
                p,
                np.mean([y[s][i] * y[u][i] for s, u in runs for i in n]),
                np.mean([y[s][i] * y[u][j] for s, u in runs for i, j in mates]),
                np.mean([y[s][i] * y[s][j] for s in y for i, j in mates]),
            ]
        )
    e = estimate(arms, DIFFERENCE)
    found = moments(arms, e)
    np.testing.assert_allclose(astuple(found)[:4], np.mean(expected, axis=0))
    assert astuple(found)[4:] == (e.var_seed, e.var_cluster, e.var_residual, 9, len(ids))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.76])
@pytest.mark.parametrize("rho", [0.0, 0.03, 0.5, 0.95])
def test_covariance_of_two_answers(p, rho):
    h = stats.norm.ppf(p)
    both = stats.multivariate_normal.cdf([h, h], cov=[[1, rho], [rho, 1]])
    assert simulation._covariance(p, rho) == pytest.approx(both - p**2, abs=1e-6)
    assert simulation._inverse(p, simulation._covariance(p, rho)) == pytest.approx(rho, abs=1e-9)


@pytest.mark.parametrize(
    "like", [LIKE, replace(LIKE, var_cluster=0.0), replace(LIKE, accuracy=0.7, var_seed=0.0, var_residual=600.0)]
)
def test_simulated_studies_have_the_moments_they_are_made_from(like):
    """All moments are recovered: those of answers from one large study, those of contrasts from many small ones."""
    population, rng = Population.like(like), np.random.default_rng(1)
    arms = dict.fromkeys("ab", like.accuracy)
    found = [estimate(population.study(rng, arms, 4), DIFFERENCE) for _ in range(150)]
    for name in ("var_seed", "var_cluster", "var_residual"):
        values = [getattr(e, name) for e in found]
        cut = {"var_seed": 1.0, "var_cluster": 12.0, "var_residual": 0.0}[name]  # truncation at 0 adds at most this
        wrong = abs(np.mean(values) - getattr(like, name))
        assert wrong < 4 * np.std(values) / len(values) ** 0.5 + cut, name
    large = population.study(rng, arms, 60)
    again = moments(large, estimate(large, DIFFERENCE))
    for name in ("accuracy", "same_image", "same_cluster", "same_run"):
        assert getattr(again, name) == pytest.approx(getattr(like, name), abs=0.02 if name == "accuracy" else 0.008), (
            name
        )


def test_arms_have_the_requested_accuracies():
    population, rng = Population.like(LIKE), np.random.default_rng(2)
    arms = {"a": 0.8, "b": 0.5, "c": 0.2}
    studies = [population.study(rng, arms, 3) for _ in range(60)]
    for name, accuracy in arms.items():
        assert np.mean([list(s[name].correct.values()) for s in studies]) == pytest.approx(accuracy, abs=0.01)


def test_the_same_generator_gives_the_same_study():
    one, other = (Population.like(LIKE).study(np.random.default_rng(3), {"a": 0.5}, 2)["a"] for _ in range(2))
    assert all((one.correct[s] == other.correct[s]).all() for s in (0, 1))


def test_impossible_moments_are_refused():
    with pytest.raises(ValueError, match="can't have a covariance"):
        Population.like(replace(LIKE, same_image=0.3))
    with pytest.raises(ValueError, match="by more than the clusters"):
        Population.like(replace(LIKE, var_cluster=5000.0))
    with pytest.raises(ValueError, match="more than the total"):
        Population.like(replace(LIKE, same_run=0.2, same_image=0.2, var_residual=3000.0))
    ids = np.arange(4, dtype=np.int32)
    alone = {n: Outcomes({s: np.array([1, 0, 1, s], bool) for s in (0, 1)}, ids) for n in "ab"}
    with pytest.raises(ValueError, match="clusters of several images"):
        moments(alone, estimate(alone, DIFFERENCE))
