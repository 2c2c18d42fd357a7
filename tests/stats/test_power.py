"""Several contrasts, power and equivalence: by definition, and in simulated studies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from atdiag.stats import contrasts
from atdiag.stats.contrasts import Estimate, equivalent, estimate, holm, seeds_needed
from tests.stats.outcomes import DIFFERENCE, arms_of, random_arms


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(p_values):
    """Adjusted p_i = max over the hypotheses j ranked no later than i of min(1, p_j times those not yet rejected)."""
    m = len(p_values)
    rank = np.argsort(np.argsort(p_values, kind="stable"), kind="stable")
    expected = [max(min(1.0, (m - rank[j]) * p_values[j]) for j in range(m) if rank[j] <= rank[i]) for i in range(m)]
    np.testing.assert_allclose(holm(p_values), expected)


def test_holm_refuses_values_that_are_no_p_values():
    for wrong in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="p-values"):
            holm([0.5, wrong])


TEMPLATE = Estimate(
    value=2.0, low=0, high=0, level=0.95, p=1, seeds=3, images=2396, clusters=599, df=2, se=1,
    covers="seeds and images", var_seed=1.0, var_cluster=10.0, var_residual=970.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "components"), [(2.0, (1, 10, 970)), (1.0, (1, 10, 970)), (2.5, (1, 260, 890)), (6.0, (1, 0, 970))]
)
def test_seeds_needed_reach_the_power_they_promise(value, components):
    """Against normal scores drawn from the components: four in five studies are clear (more where seeds are few)."""
    seed, cluster, residual = components
    S = seeds_needed(replace(TEMPLATE, value=value, var_seed=seed, var_cluster=cluster, var_residual=residual))
    assert S is not None and 3 <= S <= 30
    rng, clear = np.random.default_rng(0), 0
    for _ in range(300):
        z = value + seed**0.5 * rng.normal(size=(S, 1)) + cluster**0.5 * rng.normal(size=(1, 599))
        z = z + residual**0.5 * rng.normal(size=(S, 599))
        ms_s, ms_c, ms_e = contrasts._mean_squares(z)
        a, b = ms_s, max(ms_c - ms_e, 0)
        t = stats.t.ppf(0.975, contrasts._degrees(a, b, S, 599))
        clear += abs(z.mean()) > t * np.sqrt((a + b) / (S * 599))
    assert 0.72 < clear / 300 < 0.95


def test_seeds_needed():
    needed = [seeds_needed(replace(TEMPLATE, value=v)) for v in (20.0, 5.0, 2.0, 1.0, -1.0)]
    assert needed == sorted(needed)
    assert needed[-1] == needed[-2]
    assert seeds_needed(TEMPLATE, power=0.9) > seeds_needed(TEMPLATE)
    # More seeds do not make the test set larger: 2.8 standard errors of the images alone are 2.8 * sqrt(100 / 599).
    assert seeds_needed(replace(TEMPLATE, value=1.1, var_cluster=100.0)) is None
    assert seeds_needed(replace(TEMPLATE, value=1.0), most=10) is None
    assert seeds_needed(replace(TEMPLATE, value=0.0)) is None
    with pytest.raises(ValueError, match="one seed"):
        seeds_needed(replace(TEMPLATE, seeds=1, var_seed=None, var_residual=None))
    with pytest.raises(ValueError, match="power"):
        seeds_needed(TEMPLATE, power=80)


def test_an_undecided_contrast_needs_more_seeds_than_it_has():
    for seed in range(60):
        e = estimate(random_arms(seed, clusters=60), DIFFERENCE)
        if not e.clear and (needed := seeds_needed(e)) is not None:
            assert needed > e.seeds


def test_equivalence_is_two_one_sided_tests():
    e = estimate(random_arms(8, seeds=4, clusters=300), DIFFERENCE)
    for margin in (0.5 * abs(e.value), abs(e.value) + e.se, abs(e.value) + 2 * e.se, abs(e.value) + 5 * e.se):
        p = max(stats.t.sf((e.value + margin) / e.se, e.df), stats.t.cdf((e.value - margin) / e.se, e.df))
        assert equivalent(e, margin) == (p < 0.05)
    for margin in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            equivalent(e, margin)


# --- simulated studies: 2 arms, 3 seeds, 2,396 images in 599 clusters of 4, logistic outcomes ------------------------


CLUSTERS = np.repeat(np.arange(599, dtype=np.int32), 4)


SLOPE = 16.0
"""Points of accuracy for one unit of logit in this model: what turns an SD in points to one in logits."""


def simulate(studies: int, seed_sd: float, image: float, effect: float = 0.0) -> Iterator[Estimate]:
    """Contrasts of two arms of equal expected accuracy, which disagree on 35 % of images.

    ``seed_sd``: SD of the accuracy difference between seeds, in points. ``image``: SD of each arm's own difficulty of
    images, in logits: 0 for two identical arms (a real A/A study), 1 for arms as different as images are.
    """
    rng = np.random.default_rng([2026, int(10 * seed_sd), int(10 * image)])

    def normal(*shape: int, clustered: bool = False) -> np.ndarray:
        z = rng.standard_normal((*shape, 599 if clustered else 2396), dtype=np.float32)
        return z[..., CLUSTERS] if clustered else z

    for _ in range(studies):
        logit = 0.5 + normal(clustered=True) + 1.2 * normal() + 0.5 * normal(2, 3, clustered=True)
        logit += image * (0.6 * normal(2, 1, clustered=True) + 0.8 * normal(2, 1))
        logit += (rng.standard_normal((2, 3, 1)) * seed_sd / 2**0.5 + np.reshape([effect, 0], (2, 1, 1))) / SLOPE
        correct = rng.random(logit.shape, dtype=np.float32) < special.expit(logit)
        yield estimate(arms_of(correct, CLUSTERS), DIFFERENCE)


QUICK = [(0, 0), (1, 0), (0.5, 0.5), (1, 1), (2, 1)]


MORE = [(0.5, 0), (2, 0), (0, 0.5), (1, 0.5), (2, 0.5), (0, 1), (0.5, 1), (4, 1)]


@pytest.mark.parametrize(
    ("seed_sd", "image"), [*QUICK, *(pytest.param(*setting, marks=pytest.mark.slow) for setting in MORE)]
)
def test_false_alarms_in_2000_studies_without_a_difference(seed_sd, image):
    alarms = sum(e.clear for e in simulate(2000, seed_sd, image))
    print(f"seed SD {seed_sd}, image {image}: {alarms / 20:.2f} % false alarms")
    assert 60 <= alarms <= 140


def test_a_planted_effect_is_covered_and_found_at_the_promised_rate():
    found = list(simulate(1000, seed_sd=1, image=0.5, effect=6))
    truth = np.mean([e.value for e in found])
    assert truth == pytest.approx(6, abs=0.3)
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert 0.93 <= covered <= 0.97

    mean_of = {name: np.mean([getattr(e, name) for e in found]) for name in ("var_seed", "var_cluster", "var_residual")}
    promise = replace(found[0], value=truth, **mean_of)
    assert seeds_needed(promise) == 3  # for a power of 80 %, and with a smaller effect more
    assert seeds_needed(replace(promise, value=0.75 * truth)) > 3
    assert 0.8 <= np.mean([e.clear for e in found]) <= 0.95
    assert not any(e.high < 0 for e in found)
