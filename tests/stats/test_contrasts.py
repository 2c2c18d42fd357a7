"""Contrasts against explicit formulas, and invariance to what must not matter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atdiag.core.spec import Seed
from atdiag.stats.contrasts import Estimate, Outcomes, equivalent, estimate, seeds_needed
from tests.stats.outcomes import DIFFERENCE, arms_of, numbers, random_arms

studies = st.builds(
    random_arms,
    seed=st.integers(0, 10**6),
    arms=st.just(4),
    seeds=st.integers(1, 6),
    clusters=st.integers(2, 30),
    unequal=st.booleans(),
)


some_weights = st.fixed_dictionaries({name: st.sampled_from([-2.0, -1.0, 0.5, 1.0]) for name in "abcd"})


def same(one: Estimate, other: Estimate) -> None:
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-6, atol=1e-8)
    assert (one.seeds, one.images, one.clusters, one.covers) == (
        other.seeds,
        other.images,
        other.clusters,
        other.covers,
    )


# --- against explicit formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 4, 7])
def test_two_way_anova_by_naive_sums(seeds):
    arms = random_arms(seeds, arms=4, seeds=seeds)
    weights = {"a": 1, "b": -1, "c": -1, "d": 1}
    ids = np.unique(arms["a"].clusters)
    C, S = len(ids), seeds
    z = [
        [
            np.mean(
                [
                    100 * sum(w * float(arms[a].correct[s][i]) for a, w in weights.items())
                    for i in range(len(arms["a"].clusters))
                    if arms["a"].clusters[i] == c
                ]
            )
            for c in ids
        ]
        for s in range(S)
    ]
    grand = sum(map(sum, z)) / (S * C)
    rows = [sum(z[s]) / C for s in range(S)]
    columns = [sum(z[s][c] for s in range(S)) / S for c in range(C)]
    ms_s = C * sum((r - grand) ** 2 for r in rows) / (S - 1)
    ms_c = S * sum((c - grand) ** 2 for c in columns) / (C - 1)
    ms_e = sum((z[s][c] - rows[s] - columns[c] + grand) ** 2 for s in range(S) for c in range(C)) / ((S - 1) * (C - 1))
    a, b = ms_s, max(ms_c - ms_e, 0)
    nu = (a + b) ** 2 / (a**2 / (S - 1) + b**2 / (C - 1))
    m = min(S, C) - 1
    df = m * (nu / m) ** min(1, m / 4)
    se = np.sqrt((a + b) / (S * C))

    e = estimate(arms, weights)
    assert e.value == pytest.approx(grand)
    assert e.var_seed == pytest.approx(max(ms_s - ms_e, 0) / C)
    assert e.var_cluster == pytest.approx(b / S)
    assert e.var_residual == pytest.approx(ms_e)
    assert (e.se, e.df) == (pytest.approx(se), pytest.approx(df))
    half = stats.t.ppf(0.975, df) * se
    assert (e.low, e.high) == (pytest.approx(grand - half), pytest.approx(grand + half))
    assert e.p == pytest.approx(2 * stats.t.cdf(-abs(grand) / se, df))
    assert (e.seeds, e.images, e.clusters, e.covers) == (S, 60, 20, "seeds and images")


def test_from_five_seeds_on_the_degrees_of_freedom_are_satterthwaites():
    e = estimate(random_arms(1, seeds=5, clusters=50), DIFFERENCE)
    of_seeds, of_clusters = e.se**2 - e.var_cluster / 50, e.var_cluster / 50
    assert e.df == pytest.approx(e.se**4 / (of_seeds**2 / 4 + of_clusters**2 / 49))


def test_without_image_component_it_is_the_t_test_over_seeds():
    """Where MS_C <= MS_E, what is left is the one-sample t-test of the seeds' means."""
    for seed in range(100):
        arms = random_arms(seed)
        e = estimate(arms, DIFFERENCE)
        if e.var_cluster == 0:
            break
    means = [100 * (arms["a"].correct[s].mean() - arms["b"].correct[s].mean()) for s in range(3)]
    assert e.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert e.df == pytest.approx(2)


def test_one_seed_is_the_paired_t_test_over_images_and_covers_images_only():
    rng = np.random.default_rng(0)
    correct = rng.random((2, 1, 200)) < [[[0.9]], [[0.5]]]
    e = estimate(arms_of(correct, np.arange(200)), DIFFERENCE)
    reference = stats.ttest_rel(100.0 * correct[0, 0], 100.0 * correct[1, 0])
    assert e.p == pytest.approx(reference.pvalue)
    assert (e.low, e.high) == (pytest.approx(reference.confidence_interval()[0]), pytest.approx(e.value * 2 - e.low))
    assert e.low > 0
    assert e.covers == "images only"
    assert not e.clear
    assert not equivalent(e, 100)
    assert e.var_seed is None and e.var_residual is None


def test_unequal_clusters_are_linearised_as_a_ratio():
    arms = random_arms(3, seeds=1, unequal=True)
    d, ids = 100.0 * (arms["a"].correct[0].astype(int) - arms["b"].correct[0]), arms["a"].clusters
    C, n = len(np.unique(ids)), len(ids)
    assert len(np.unique(np.unique(ids, return_counts=True)[1])) > 1
    variance = sum((d[ids == c] - d.mean()).sum() ** 2 for c in np.unique(ids)) * C / (C - 1) / n**2
    e = estimate(arms, DIFFERENCE)
    assert e.value == pytest.approx(d.mean())
    assert e.se == pytest.approx(np.sqrt(variance))


def test_a_seed_effect_does_not_leak_into_the_residual_of_unequal_clusters():
    """If a seed shifts every image alike, the residual MS_E is 0 whatever the clusters' sizes."""
    ids = np.repeat(np.arange(4), [1, 2, 3, 9])
    correct = np.stack([np.zeros(15, bool), np.ones(15, bool), np.zeros(15, bool)])
    e = estimate({"a": Outcomes(dict(enumerate(correct)), ids)}, {"a": 1})
    assert e.var_residual == pytest.approx(0, abs=1e-9)
    assert e.var_seed == pytest.approx(100**2 / 3)


def test_clusters_of_one_image_are_images():
    arms = random_arms(4, seeds=3)
    alone = {name: replace(arm, clusters=np.arange(60, dtype=np.int32)) for name, arm in arms.items()}
    e = estimate(alone, DIFFERENCE)
    d = np.stack([100.0 * (arms["a"].correct[s].astype(int) - arms["b"].correct[s]) for s in range(3)])
    residual = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    assert e.clusters == e.images == 60
    assert e.var_residual == pytest.approx((residual**2).sum() / (2 * 59))


def test_repeated_images_count_once():
    """Each image repeated four times as one cluster adds no information."""
    arms = random_arms(5, clusters=40)
    once = {name: replace(arm, clusters=np.arange(120, dtype=np.int32)) for name, arm in arms.items()}
    four = {
        name: Outcomes({s: np.tile(y, 4) for s, y in arm.correct.items()}, np.tile(np.arange(120, dtype=np.int32), 4))
        for name, arm in arms.items()
    }
    a, b = estimate(once, DIFFERENCE), estimate(four, DIFFERENCE)
    np.testing.assert_allclose(numbers(a), numbers(b))


# --- what must not matter --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(studies, some_weights)
def test_swapping_signs_flips_the_interval(arms, weights):
    e, flipped = estimate(arms, weights), estimate(arms, {name: -w for name, w in weights.items()})
    same(e, replace(flipped, value=-flipped.value, low=-flipped.high, high=-flipped.low))


@settings(max_examples=40, deadline=None)
@given(studies, some_weights, st.floats(0.1, 10))
def test_scaling_the_weights_scales_the_points(arms, weights, factor):
    e, scaled = estimate(arms, weights), estimate(arms, {name: factor * w for name, w in weights.items()})
    np.testing.assert_allclose(
        [scaled.value, scaled.low, scaled.high, scaled.se],
        [factor * x for x in (e.value, e.low, e.high, e.se)],
        rtol=1e-6,
        atol=1e-7,
    )
    np.testing.assert_allclose([scaled.p, scaled.df], [e.p, e.df], rtol=1e-5, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(studies, some_weights, st.randoms(use_true_random=False))
def test_the_order_of_images_and_names_of_clusters_and_seeds_do_not_matter(arms, weights, random):
    ids = arms["a"].clusters
    order = np.array(random.sample(range(len(ids)), len(ids)))
    renamed = dict(zip(np.unique(ids), random.sample(range(-(2**31), 2**31), len(np.unique(ids))), strict=True))
    seeds = random.sample(list(arms["a"].correct), len(arms["a"].correct))
    other = {
        name: Outcomes(
            {Seed(data=s, model=7): arm.correct[s][order] for s in seeds},
            np.array([renamed[c] for c in ids[order]], dtype=np.int32),
        )
        for name, arm in arms.items()
    }
    same(estimate(arms, weights), estimate(other, weights))


@settings(max_examples=40, deadline=None)
@given(studies, st.sampled_from([0.0, 0.1, 1.0, 3.0]))
def test_an_arm_on_both_sides_cancels(arms, weight):
    twice = {**arms, "c again": arms["c"]}
    same(estimate(arms, DIFFERENCE), estimate(twice, {**DIFFERENCE, "c": weight, "c again": -weight}))


@settings(max_examples=60, deadline=None)
@given(studies, some_weights)
def test_estimates_are_always_finite_and_consistent(arms, weights):
    e = estimate(arms, weights)
    assert np.isfinite(numbers(e)).all()
    assert e.low <= e.value <= e.high
    assert 0 <= e.p <= 1
    assert min(e.seeds, e.clusters) - 1 <= e.df + 1e-9 or e.seeds == 1
    assert e.clear == (e.p < 0.05 and e.seeds > 2)
    wider = e.interval(0.99)
    assert wider[0] <= e.low and e.high <= wider[1]
    np.testing.assert_allclose(e.interval(e.level), (e.low, e.high))


def test_only_shared_seeds_count():
    arms = random_arms(6, seeds=5)
    fewer = {**arms, "b": replace(arms["b"], correct={s: arms["b"].correct[s] for s in (4, 1, 3)})}
    both = {name: replace(arm, correct={s: arm.correct[s] for s in (1, 3, 4)}) for name, arm in arms.items()}
    same(estimate(fewer, DIFFERENCE), estimate(both, DIFFERENCE))
    assert estimate(fewer, DIFFERENCE).seeds == 3
    assert estimate(fewer, {"a": 1, "b": 0}).seeds == 5


# --- degenerate and wrong input --------------------------------------------------------------------------------------


def test_an_arm_minus_itself_is_exactly_nothing():
    arms = random_arms(7)
    for weights in ({"a": 1, "b": -1}, {"a": 0.1, "b": 0.2, "c": -0.3}):
        e = estimate({"a": arms["a"], "b": arms["a"], "c": arms["a"]}, weights)
        assert numbers(e) == [0, 0, 0, 1, 2, 0, 0, 0, 0]
        assert not e.clear
        assert equivalent(e, 0.1)
        assert seeds_needed(e) is None


def test_without_any_variance():
    arms = arms_of(np.stack([np.ones((3, 8), bool), np.zeros((3, 8), bool)]), np.arange(8))
    everything, gap = estimate(arms, {"a": 1}), estimate(arms, DIFFERENCE)
    assert (everything.value, everything.low, everything.high) == (100, 100, 100)
    assert (gap.value, gap.p, gap.clear, seeds_needed(gap)) == (100, 0, True, 3)


def test_seeds_that_tie_by_chance_are_no_certainty():
    """Three seeds, each right on a different half of the images: equal accuracies, and yet no zero-width interval."""
    correct = np.stack([np.roll([True] * 6 + [False] * 6, shift) for shift in (0, 4, 8)])
    e = estimate({"a": Outcomes(dict(enumerate(correct)), np.arange(12))}, {"a": 1})
    assert e.value == 50
    assert e.se == pytest.approx(np.sqrt(e.var_residual / 36))
    assert e.se > 5


def test_seeds_that_agree_everywhere_leave_the_images():
    correct = np.random.default_rng(0).random(100) < 0.7
    e = estimate({"a": Outcomes(dict.fromkeys(range(3), correct), np.arange(100))}, {"a": 1})
    assert e.se == pytest.approx((100.0 * correct).std(ddof=1) / 10)
    assert (e.var_seed, e.var_residual) == (pytest.approx(0), pytest.approx(0))


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({}, {"a": 1, "copi": -1}, "no arm named 'copi'"),
        ({}, {}, "finite weights"),
        ({}, {"a": 0, "b": 0}, "finite weights"),
        ({}, {"a": 1, "b": float("nan")}, "finite weights"),
        ({"b": Outcomes({9: np.ones(60, bool)}, np.repeat(np.arange(20), 3))}, DIFFERENCE, "no seed in common"),
        ({"b": Outcomes({}, np.repeat(np.arange(20), 3))}, DIFFERENCE, "'b': none"),
        ({"b": Outcomes({0: np.ones(60, bool)}, np.arange(60))}, DIFFERENCE, "same images"),
        ({"b": Outcomes({0: np.ones(59, bool)}, np.arange(59))}, DIFFERENCE, "same images"),
        ({"a": Outcomes({0: np.ones(60, bool)}, np.zeros(60, np.int32))}, {"a": 1}, "one cluster"),
    ],
)
def test_wrong_input_names_the_problem(change, weights, message):
    rng = np.random.default_rng(0)
    arms = arms_of(rng.random((2, 3, 60)) < 0.5, np.repeat(np.arange(20), 3)) | change
    with pytest.raises(ValueError, match=message):
        estimate(arms, weights)


def test_outcomes_and_levels_are_checked():
    with pytest.raises(ValueError, match="shape"):
        Outcomes({0: np.ones(3, bool)}, np.arange(4))
    with pytest.raises(ValueError, match="bool"):
        Outcomes({0: np.ones(4)}, np.arange(4))
    with pytest.raises(ValueError, match="clusters"):
        Outcomes({}, np.array([], dtype=np.int32))
    with pytest.raises(ValueError, match="level"):
        estimate(random_arms(0), DIFFERENCE, level=95)


# --- log-odds --------------------------------------------------------------------------------------------------------


def _drawn(shares, seeds=6, images=400, seed=0):
    draw = np.random.default_rng(seed)
    clusters = np.arange(images, dtype=np.int32)
    return {
        name: Outcomes({s: draw.random(images) < share for s in range(seeds)}, clusters)
        for name, share in shares.items()
    }


def test_a_contrast_in_log_odds_is_that_of_the_accuracies():
    made = _drawn({"a": 0.9, "b": 0.6, "c": 0.5, "d": 0.2})
    weights = {"a": 1, "b": -1, "c": -1, "d": 1}
    shares = {name: np.mean(list(arm.correct.values())) for name, arm in made.items()}
    expected = sum(weight * np.log(shares[name] / (1 - shares[name])) for name, weight in weights.items())
    found = estimate(made, weights, scale="log-odds")
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert (found.scale, found.digits) == ("log-odds", 2)


def test_the_standard_error_in_log_odds_is_the_delta_methods():
    (made,) = _drawn({"a": 0.8}).values()
    points, odds = estimate({"a": made}, {"a": 1}), estimate({"a": made}, {"a": 1}, scale="log-odds")
    share = points.value / 100
    assert odds.se == pytest.approx(points.se / 100 / (share * (1 - share)))
    assert odds.df == pytest.approx(points.df)
    # and it is the spread of the estimate over studies
    values = [estimate(_drawn({"a": 0.8}, seed=i), {"a": 1}, scale="log-odds").value for i in range(200)]
    assert np.std(values) == pytest.approx(odds.se, rel=0.35)


def test_log_odds_of_an_arm_without_errors_are_finite():
    clusters = np.arange(50, dtype=np.int32)
    perfect = Outcomes({s: np.ones(50, bool) for s in range(3)}, clusters)
    found = estimate({"a": perfect}, {"a": 1}, scale="log-odds")
    assert found.value == pytest.approx(np.log(149.5 / 0.5))
