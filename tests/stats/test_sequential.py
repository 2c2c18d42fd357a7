"""Graphs of hypotheses, against Holm's method and worked examples; planned looks; one-sided tests."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atdiag.stats import sequential
from atdiag.stats.contrasts import estimate, holm, one_sided
from atdiag.stats.sequential import Graph
from tests.stats.outcomes import arms_of

P = st.floats(0, 1)
NAMES = "abcdef"


@given(st.lists(P, min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holms_graph_rejects_what_holms_method_does(values, level):
    p_values = dict(zip(NAMES, values, strict=False))
    found = Graph.holm(list(p_values)).rejected(p_values, level)
    expected = {name for name, p in zip(p_values, holm(values), strict=True) if p <= level}
    # A p-value within rounding of its bound may go either way.
    near = {name for name, p in zip(p_values, holm(values), strict=True) if abs(p - level) < 1e-12}
    assert set(found) - near == expected - near


def test_the_fallback_procedure_by_hand():
    """Two primary hypotheses, each with a secondary one behind it (Bretz et al. 2009, section 2)."""
    graph = Graph(
        {"h1": 0.5, "h2": 0.5, "h3": 0, "h4": 0},
        {"h1": {"h2": 0.5, "h3": 0.5}, "h2": {"h1": 0.5, "h4": 0.5}, "h3": {"h2": 1.0}, "h4": {"h1": 1.0}},
    )
    # h1 at .0125; its share makes h2 worth .01875 and h3 .00625: h3 passes, and gives h2 all of the level.
    p_values = {"h1": 0.0100, "h2": 0.0200, "h3": 0.0050, "h4": 0.9}
    assert graph.rejected(p_values, 0.025) == ("h1", "h3", "h2")
    assert graph.rejected(p_values | {"h3": 0.0070}, 0.025) == ("h1",)
    assert graph.rejected({"h3": 0.0, "h4": 0.0}, 0.025) == (), "nothing passed a share on"


@given(st.permutations(NAMES[:4]), st.lists(st.floats(0, 0.1), min_size=4, max_size=4))
def test_the_order_of_names_changes_nothing(order, values):
    shares = {"a": 0.4, "b": 0.3, "c": 0.3, "d": 0.0}
    edges = {"a": {"d": 1.0}, "b": {"c": 0.7, "a": 0.3}, "c": {"b": 1.0}, "d": {"b": 0.5, "c": 0.5}}
    p_values = dict(zip(NAMES, values, strict=False))
    known = Graph(shares, edges).rejected(p_values, 0.05)
    other = Graph({name: shares[name] for name in order}, {name: dict(reversed(edges[name].items())) for name in order})
    assert set(other.rejected({name: p_values[name] for name in order}, 0.05)) == set(known)


def test_more_significant_p_values_never_reject_less():
    graph = Graph({"a": 0.5, "b": 0.5, "c": 0.0}, {"a": {"c": 1.0}, "b": {"a": 1.0}, "c": {"b": 1.0}})
    for values in permutations([0.001, 0.02, 0.03]):
        p_values = dict(zip("abc", values, strict=True))
        smaller = {name: p / 2 for name, p in p_values.items()}
        assert set(graph.rejected(p_values, 0.05)) <= set(graph.rejected(smaller, 0.05))


def test_any_false_rejection_is_at_most_the_level():
    """All hypotheses true, strongly dependent p-values: within three standard errors of the level."""
    graph = Graph({"a": 0.5, "b": 0.5, "c": 0.0}, {"a": {"c": 1.0}, "b": {"c": 1.0}, "c": {}})
    rng = np.random.default_rng(0)
    z = rng.standard_normal((4000, 1)) * 0.8 + rng.standard_normal((4000, 3)) * 0.6
    some = sum(bool(graph.rejected(dict(zip("abc", row, strict=True)), 0.05)) for row in stats.norm.sf(z).tolist())
    assert some / 4000 <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("shares", "edges"),
    [
        ({"a": 0.7, "b": 0.6}, {}),
        ({"a": -0.1}, {}),
        ({"a": 0.5, "b": 0.5}, {"a": {"b": 1.1}}),
        ({"a": 0.5}, {"a": {"a": 1.0}}),
        ({"a": 0.5}, {"b": {"a": 1.0}}),
        ({"a": 0.5}, {"a": {"c": 1.0}}),
    ],
)
def test_a_graph_that_would_not_keep_the_level_is_refused(shares, edges):
    with pytest.raises(ValueError, match=r"shares|edges|itself|named"):
        Graph(shares, edges)


def test_a_p_value_of_no_hypothesis_is_refused():
    with pytest.raises(ValueError, match="no hypothesis is named b"):
        Graph.holm(["a"]).rejected({"b": 0.1}, 0.05)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True).map(sorted), st.floats(0.001, 0.2))
def test_looks_share_alpha(seeds, alpha):
    planned = sequential.looks(seeds, alpha)
    assert [look.seeds for look in planned] == seeds
    assert sum(look.level for look in planned) == pytest.approx(alpha)


@pytest.mark.parametrize("seeds", [[], [5, 5], [8, 5], [0, 3], [2, 3, 4, 5]])
def test_looks_that_are_no_looks_are_refused(seeds):
    with pytest.raises(ValueError, match="look"):
        sequential.looks(seeds)


@pytest.mark.parametrize("seeds", [1, 3, 5, 8])
@given(bound=st.floats(-30, 30), p=st.floats(0.001, 0.4))
def test_one_sided_tests_agree_with_the_interval(seeds, bound, p):
    rng = np.random.default_rng(seeds)
    right = np.stack([rng.random((seeds, 200)) < 0.7, rng.random((seeds, 200)) < 0.6])
    found = estimate(arms_of(right, np.arange(200)), {"a": 1, "b": -1})
    assert one_sided(found, "above", bound) + one_sided(found, "below", bound) == pytest.approx(1)
    assert one_sided(found, "above") == pytest.approx(found.p / 2 if found.value > 0 else 1 - found.p / 2)
    low, high = found.interval(1 - 2 * p)
    assert one_sided(found, "above", low) == pytest.approx(p, rel=1e-6)
    assert one_sided(found, "below", high) == pytest.approx(p, rel=1e-6)


def test_without_variance_a_one_sided_test_is_certain():
    right = np.stack([np.ones((3, 20), bool), np.zeros((3, 20), bool)])
    found = estimate(arms_of(right, np.arange(20)), {"a": 1, "b": -1})
    assert one_sided(found, "above", 99.0) == 0
    assert one_sided(found, "above", 100.0) == 1
    assert one_sided(found, "below") == 1
