"""Exact tests against scipy and explicit enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from atdiag.stats.association import LEVEL, Fact, against, fisher, least, spearman
from atdiag.stats.paired import gap


def by_counting(fails_with, fails, gains, having):
    """Two-sided Fisher: the share of assignments of the fact at most as likely as the observed one."""

    def ways(both):
        return math.comb(fails, both) * math.comb(gains, having - both) if both <= having else 0

    every = [ways(both) for both in range(fails + 1)]
    return sum(w for w in every if w <= ways(fails_with)) / math.comb(fails + gains, having)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_fisher_equals_enumeration(a, b, c, d):
    assume(a + b + c + d > 0)
    assert fisher([[a, b], [c, d]]) == pytest.approx(by_counting(a, a + b, c + d, a + c))


@given(st.integers(0, 5), st.integers(0, 6), st.data())
def test_the_least_p_value_is_reached_and_not_undercut(fails, gains, data):
    having = data.draw(st.integers(0, fails + gains))
    reachable = [
        by_counting(both, fails, gains, having)
        for both in range(fails + 1)
        if 0 <= having - both <= gains
    ]  # fmt: skip
    assert least(fails, gains, having) == pytest.approx(min(reachable))


def test_four_of_eleven_reach_one_in_330():
    assert least(4, 7, 4) == pytest.approx(1 / 330)
    assert least(1, 10, 1) == pytest.approx(1 / 11)  # with a single failing family nothing can be significant


OUTCOMES = {**dict.fromkeys("abcd", "fails"), **dict.fromkeys("efghijk", "gains"), "l": "undecided"}


def fact(name, having, kind="recipe", known="abcdefghijkl"):
    return Fact(name, kind, {unit: unit in having for unit in known})


def test_a_fact_that_separates_and_one_with_an_exception():
    parts, exception = against([fact("x", "abcd"), fact("y", "abce")], OUTCOMES)
    assert parts.fails == (("a", "b", "c", "d"), ()) and parts.gains == ((), ("e", "f", "g", "h", "i", "j", "k"))
    assert parts.separates and parts.p == pytest.approx(1 / 330) and parts.adjusted == pytest.approx(2 / 330)
    assert parts.clear
    assert not exception.separates and exception.p == pytest.approx(by_counting(3, 4, 7, 4))


def test_the_absence_of_a_fact_separates_as_well():
    (one,) = against([fact("x", "efghijkl")], OUTCOMES)
    assert one.separates and one.p == pytest.approx(1 / 330)


def test_facts_with_the_same_split_are_one_hypothesis():
    same = [fact("x", "abcd"), fact("y", "efghijk", "architecture"), fact("z", "abcdl")]
    found = against([*same, fact("w", "abe")], OUTCOMES)
    assert [one.adjusted for one in found[:3]] == pytest.approx([2 / 330] * 3)  # x = y = z, and w
    assert [f.name for f in found[0].same] == ["y", "z"] and not found[3].same


def test_facts_that_could_never_be_significant_are_not_counted():
    found = against([fact("x", "abcd"), *(fact(unit, unit) for unit in "aefg"), fact("none", "")], OUTCOMES)
    assert found[0].adjusted == pytest.approx(1 / 330)
    assert all(one.least >= LEVEL and one.adjusted is None and not one.clear for one in found[1:])
    assert found[-1].p == 1 and not found[-1].separates and not found[-1].same


def test_units_with_an_unknown_fact_do_not_count():
    (one,) = against([fact("x", "abc", known="abcefg")], OUTCOMES)
    assert one.separates and one.p == pytest.approx(2 / 20) and one.adjusted is None


def test_nothing_separates_equal_outcomes():
    (one,) = against([fact("x", "ab")], dict.fromkeys("abcd", "gains"))
    assert (one.p, one.least, one.separates) == (1, 1, False)


# --- ranks ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=3, max_size=6))
def test_spearman_equals_enumeration_of_permutations(pairs):
    x, y = zip(*pairs, strict=True)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    found = spearman(x, y)
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    a, b = stats.rankdata(x), stats.rankdata(y)
    every = np.array([np.dot(order, b) for order in itertools.permutations(a)])
    tails = [np.mean(every >= a @ b - 1e-9), np.mean(every <= a @ b + 1e-9)]
    assert found.p == pytest.approx(min(1, 2 * min(tails)))
    assert found.least <= found.p + 1e-12


def test_the_least_p_value_of_ranks():
    assert spearman(range(4), [3, 1, 2, 0]).least == pytest.approx(2 / 24)
    perfect = spearman(range(5), [4, 3, 2, 1, 0])
    assert perfect.rho == -1 and perfect.p == perfect.least == pytest.approx(2 / 120)


def test_ranks_of_many_equal_scipys():
    draw = np.random.default_rng(0)
    x, y = draw.random(12), draw.random(12)
    assert spearman(x, y).p == pytest.approx(stats.spearmanr(x, y).pvalue)


def test_constant_values_have_no_correlation():
    found = spearman([1, 1, 1], [1, 2, 3])
    assert (found.rho, found.p, found.least) == (0, 1, 1)
    with pytest.raises(ValueError, match="three pairs"):
        spearman([1, 2], [1, 2])


# --- differences by seed -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_a_gap_is_a_paired_t_test(pairs):
    ones, others = np.array(pairs).T
    assume(np.std(ones - others) > 1e-6)
    found, oracle = gap(dict(enumerate(ones)), dict(enumerate(others))), stats.ttest_rel(ones, others)
    interval = oracle.confidence_interval(0.95)
    assert (found.value, found.p) == pytest.approx(((ones - others).mean(), oracle.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_a_gap_pairs_by_seed():
    assert gap({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 0.5}).value == 0.75
    assert gap({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None
    same = gap({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
    assert (same.low, same.high, same.p) == (0.5, 0.5, 0.0)
