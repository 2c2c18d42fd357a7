"""The figure of gain shows what each variant changes, on both scales."""

from dataclasses import replace

import pytest

from ablations import gain as planned
from atdiag.study.protocol import Reading, Report, Series
from figures import gain, style
from tests.drawings import check
from tests.studies import estimate, fabricated, lab


def reported(teacher="dinov2_s", effects=(6.0, 1.0, -4.0, 2.0, 5.0, 3.0, 7.0)) -> Report:
    """Make a report in which the variants change a transfer's gain by these points."""
    study = planned.gain(lab(), teacher)
    made = fabricated(study, [20.0, *(step for _ in effects for step in (3.0, 25.0))], base=31.2)
    asked = {}
    for contrast in study.contrasts:
        value = effects[len(asked) // 2]
        odds = contrast.scale == "log-odds"
        found = replace(estimate(value / 20 if odds else value, half=0.1 if odds else 2.0), scale=contrast.scale)
        asked[contrast.name] = found
    return replace(made, contrasts=asked)


def made_up() -> Reading:
    """Make a reading of two teachers."""
    reports = (reported(), reported("deit_s", (6.0, 1.0, -4.0, 2.0, 5.0)))
    return Reading(Series("gain", tuple(one.study for one in reports)), reports, (), "")


def test_gain_shows_each_variant_on_both_scales():
    figure = gain.gain(reported())
    drawn = " ".join(check(figure, style.PAGE)).replace("\n", " ")
    assert all(text in drawn for text in ("gain 0.1 (34.2, 56.2)", "LayerScale", "warm-up", "standard: 31.2, 51.2"))
    for axes, scale in zip(figure.axes, (1, 1 / 20), strict=True):
        points = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
        assert points == pytest.approx([scale * value for value in (6.0, 1.0, -4.0, 2.0, 5.0, 3.0, 7.0)])


def test_gain_of_several_teachers():
    check(gain.gain(made_up()), style.PAGE)
