"""Rescue over budgets: what is planned, where it crosses zero, and what is said on two scales."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations import pace
from ablations.rescue import rescue
from atdiag.core.errors import UserError
from tests.figures.test_pace import made_up
from tests.studies import arms, estimate, fabricated, lab


def test_each_budget_is_a_training_of_its_own_and_the_usual_one_is_that_of_rescue():
    first, last = pace.pace(lab(), "dinov2_s", "2500x4,500x1").studies
    usual = arms(rescue(lab(), "dinov2_s"))
    for name, spec in arms(last).items():
        assert spec.id == usual[name].id
        short = arms(first)[name]
        assert (short.data.train, short.recipe.epochs, short.network) == (500, 1, spec.network)
    assert first.short_on_purpose
    assert not last.short_on_purpose
    assert [contrast.scale for contrast in first.contrasts] == ["points", "log-odds"]
    assert [c.weights for c in first.contrasts] == 2 * [
        {"native + copy": 1, "native, scratch": -1, "standard + copy": -1, "scratch": 1}
    ]


def test_components_can_be_chosen():
    (study,) = pace.pace(lab(), "hub", "500x1", components="registers").studies
    assert arms(study)["native + copy"].network.components == ("registers",)
    with pytest.raises(UserError, match="has no component 'register', did you mean 'registers'"):
        pace.pace(lab(), "hub", "500x1", components="register")


@pytest.mark.parametrize("typed", ["500", "x4", "500x0", "500x", "5OOx1", "500x1x2", "-5x1"])
def test_wrong_budgets_are_refused(typed):
    if typed == "500":
        assert [s.options["budget"] for s in pace.pace(lab(), "dinov2_s", typed).studies] == ["500 epochs"]
    else:
        with pytest.raises(UserError, match="is no budget"):
            pace.pace(lab(), "dinov2_s", typed)


_BASE = fabricated(pace.pace(lab(), "dinov2_s", "500x1").studies[0], (1.0, 1.0, 1.0))


def _curve(points):
    """Return reports at 1,000, 2,000, 4,000, ... images seen, with these values and half widths."""
    return [
        replace(
            _BASE,
            contrasts={pace.POINTS: estimate(value, half)},
            study=replace(_BASE.study, curve={"scratch": 1000 * 2**i}),
        )
        for i, (value, half) in enumerate(points)
    ]


def test_the_crossing_is_where_lines_between_the_budgets_meet_zero():
    # From (1,000, +4) to (2,000, -4): halfway on the logarithmic axis. Limits +-1: a quarter of a step around it.
    found = pace.crossing(_curve([(4.0, 1.0), (-4.0, 1.0)]), pace.POINTS)
    assert found.images == pytest.approx(1000 * 2**0.5)
    assert found.low == pytest.approx(1000 * 2 ** (3 / 8))
    assert found.high == pytest.approx(1000 * 2 ** (5 / 8))


def test_a_crossing_outside_the_budgets_has_an_open_end():
    found = pace.crossing(_curve([(4.0, 1.0), (0.5, 1.0)]), pace.POINTS)
    assert (found.images, found.high) == (None, None)
    assert 1000 < found.low < 2000
    assert pace.crossing(_curve([(4.0, 1.0), (2.0, 1.0)]), pace.POINTS) is None
    assert pace.crossing(_curve([(0.5, 1.0), (-0.5, 1.0)]), pace.POINTS) == pace.Crossing(
        pytest.approx(1000 * 2**0.5), None, None
    )


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 3)), min_size=2, max_size=5))
def test_the_interval_of_a_crossing_contains_it(points):
    found = pace.crossing(_curve(points), pace.POINTS)
    if found is not None and found.images is not None:
        assert (found.low or 0) <= found.images * (1 + 1e-9)
        assert found.images <= (found.high or float("inf")) * (1 + 1e-9)


def test_a_sign_is_said_only_where_both_scales_show_it():
    said = pace.said(made_up(("dinov2_s",)).reports)
    assert "+8.0 points [+5.5, +10.5] and +0.40 log-odds [+0.30, +0.50] (clear on both scales) at 500 images" in said
    assert "-6.0 points" in said
    assert "in points it crosses zero at" in said
    first, *others = made_up(("dinov2_s",)).reports
    contrary = replace(estimate(0.05, half=0.1), scale="log-odds")
    changed = replace(first, contrasts={**first.contrasts, pace.ODDS: contrary})
    assert "(clear in points alone) at 500 images" in pace.said([changed, *others])
