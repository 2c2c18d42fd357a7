"""The interval of a median between order statistics."""

import numpy as np
import pytest
from scipy.stats import binom

from atdiag.stats.paired import median_interval


@pytest.mark.parametrize("n", [6, 7, 8, 9, 15, 21, 40])
def test_the_order_statistics_are_those_of_the_sign_test(n):
    k = max(k for k in range(1, n) if 2 * binom.cdf(k - 1, n, 0.5) <= 0.05)
    found = median_interval([float(i) for i in np.random.default_rng(0).permutation(n)])
    assert (found.low, found.high, found.value, found.repeats) == (k - 1, n - k, (n - 1) / 2, n)


def test_it_covers_the_median_of_a_skewed_distribution():
    rng = np.random.default_rng(1)
    found = [median_interval(list(rng.lognormal(sigma=1.0, size=21))) for _ in range(2000)]
    assert 0.95 <= np.mean([one.low <= 1 <= one.high for one in found]) < 0.99


def test_five_repeats_have_no_interval():
    with pytest.raises(ValueError, match="takes 6"):
        median_interval([1.0] * 5)
