"""Predictions with whole groups left out: ridge against explicit formulas and scikit-learn, and the bootstrap."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from atdiag.stats import prediction
from atdiag.stats.prediction import PENALTIES, held_out, path, rank_correlation, resampled, ridge, sign_agreement


def units(seed=0, groups=7, p=4):
    """Measurements, outcomes and groups of unequal sizes, with a signal in the first measurement."""
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(groups), draw.integers(1, 5, groups))
    x = draw.normal(size=(len(of), p)) * [1, 10, 0.1, 3][:p] + [5, 0, 2, -1][:p]
    return x, 2 * x[:, 0] + draw.normal(size=groups)[of] + draw.normal(size=len(of)), of.tolist()


def by_sklearn(x, y, groups):
    grid = {"ridge__alpha": sorted(PENALTIES, reverse=True)}  # of equally good ones it takes the first
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()), grid, scoring="neg_mean_squared_error", cv=LeaveOneGroupOut()
    )
    return search.fit(x, y, groups=groups)


def test_a_ridge_regression_is_the_explicit_formula():
    x, y, _ = units()
    z = (x - x.mean(0)) / x.std(0)
    for penalty, fitted in zip(PENALTIES, path(x, y), strict=True):
        weights = np.linalg.solve(z.T @ z + penalty * np.eye(4), z.T @ (y - y.mean()))
        np.testing.assert_allclose(fitted.weights, weights, rtol=1e-10)
        np.testing.assert_allclose(fitted(x), y.mean() + z @ weights, rtol=1e-10)


def test_more_measurements_than_units_and_constant_ones():
    x, y, _ = units(groups=2)
    wide = np.concatenate([x[:3], np.full((3, 2), 0.1)], 1)
    fitted = path(wide, y[:3], [1.0])[0]
    z = (wide - wide.mean(0)) / np.where(np.arange(6) < 4, wide.std(0), 1)
    dual = z.T @ np.linalg.solve(z @ z.T + np.eye(3), y[:3] - y[:3].mean())
    np.testing.assert_allclose(fitted.weights, dual, atol=1e-12)
    np.testing.assert_allclose(fitted.weights[4:], 0, atol=1e-12)


def test_the_whole_procedure_is_scikit_learns():
    x, y, groups = units(groups=4)
    search = by_sklearn(x, y, groups)
    assert ridge(x, y, groups).penalty == search.best_params_["ridge__alpha"]
    predicted = held_out(x, y, groups)
    for kept, out in LeaveOneGroupOut().split(x, y, groups):
        inner = by_sklearn(x[kept], y[kept], np.array(groups)[kept])
        np.testing.assert_allclose(predicted[out], inner.predict(x[out]), rtol=1e-8)


def test_a_group_is_predicted_by_what_knows_nothing_of_it():
    x, y, groups = units()
    own = np.array(groups) == 3
    changed, other = y + 1000 * own, np.where(own[:, None], x[own].mean(0), x)
    np.testing.assert_array_equal(held_out(x, changed, groups)[own], held_out(x, y, groups)[own])
    assert np.abs(held_out(x, changed, groups)[~own] - held_out(x, y, groups)[~own]).min() > 1
    same = held_out(other, y, groups)[own]  # nor does its spread enter any scale
    np.testing.assert_allclose(same, held_out(x, y, groups)[own].mean(), rtol=1e-10)


def test_units_left_out_by_one_grouping_and_penalties_chosen_by_another():
    x, y, groups = units()
    each = list(range(len(y)))
    predicted = held_out(x, y, each, inner=groups)
    kept = np.arange(len(y)) != 2
    alone = ridge(x[kept], y[kept], [one for i, one in enumerate(groups) if i != 2])
    np.testing.assert_allclose(predicted[2], alone(x[2:3])[0])


def test_wrong_input_is_refused():
    x, y, groups = units()
    with pytest.raises(ValueError, match="only group"):
        held_out(x, y, [0] * len(y))
    with pytest.raises(ValueError, match="finite"):
        ridge(np.where(np.arange(4) == 1, np.nan, x), y, groups)
    with pytest.raises(ValueError, match="shapes"):
        path(x, y[:-1])
    with pytest.raises(ValueError, match="above 0"):
        path(x, y, [0.0])
    with pytest.raises(ValueError, match="groups"):
        ridge(x, y, groups[:-1])


def test_ranks_are_correlated_within_strata():
    x, y, _ = units()
    strata = [i % 2 for i in range(len(y))]
    each = [stats.spearmanr(x[i::2, 0], y[i::2]).statistic for i in (0, 1)]
    assert rank_correlation(x[:, 0], y, strata) == pytest.approx(np.mean(each))
    shifted = x[:, 0] + 1000 * np.array(strata)  # knowing the stratum earns nothing
    assert rank_correlation(shifted, y, strata) == pytest.approx(np.mean(each))
    assert rank_correlation(np.ones(len(y)), y, strata) == 0
    tied = x[:, 0].round()
    assert rank_correlation(tied, y, [0] * len(y)) == pytest.approx(stats.spearmanr(tied, y).statistic)


def test_means_of_the_others_run_against_what_is_left_out():
    y = np.arange(10.0)
    others = [(y.sum() - one) / 9 for one in y]
    assert rank_correlation(np.array(others), y, [0] * 10) == pytest.approx(-1)


def test_signs_are_compared_where_they_are_known():
    predicted, measured = np.array([1.0, -1, 1, -1]), np.array([2.0, 2, -2, -2])
    assert sign_agreement(predicted, measured, np.array([True, True, False, True])) == pytest.approx(2 / 3)
    assert sign_agreement(predicted, measured, np.zeros(4, bool)) == 0


def test_whole_groups_are_resampled():
    groups = [name for name in "abcdefgh" for _ in range(3)]
    own = np.repeat(np.random.default_rng(0).normal(size=8), 3)
    seen = []

    def mean(chosen):
        seen.append(np.bincount(chosen, minlength=24).reshape(8, 3))
        return [float(own[chosen].mean())]

    (found,) = resampled(mean, groups, np.random.default_rng(1), resamples=4000)
    assert all((counts == counts[:, :1]).all() and counts.sum() == 24 for counts in seen)
    # The mean of eight groups, of which three equal units say no more than one.
    se = own[::3].std() / np.sqrt(8)
    assert found.value == pytest.approx(own.mean())
    assert (found.high - found.low) / (2 * 1.96 * se) == pytest.approx(1, abs=0.06)


def test_penalties_are_those_that_the_documentation_names():
    assert (PENALTIES[0], PENALTIES[-1], len(PENALTIES)) == (pytest.approx(0.1), pytest.approx(1000), 9)
    assert prediction.PENALTIES[1] / PENALTIES[0] == pytest.approx(10**0.5)
