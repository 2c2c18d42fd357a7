"""The figure of pace shows the arms' accuracies and rescue on both scales, over images seen."""

from dataclasses import replace

import pytest

from ablations import pace as planned
from atdiag.study.protocol import Reading
from figures import pace, style
from tests.drawings import check
from tests.studies import estimate, fabricated, lab


def made_up(teachers=("dinov2_s", "hub")) -> Reading:
    """Make a reading of two teachers at three budgets: a rescue that turns into its opposite."""
    reports, studies = [], []
    for teacher in teachers:
        series = planned.pace(lab(), teacher, "500x1,1000x2,2500x4")
        for study, value in zip(series.studies, (8.0, 2.0, -6.0), strict=True):
            odds = replace(estimate(value / 20, half=0.1), scale="log-odds")
            asked = {planned.POINTS: estimate(value, half=2.5), planned.ODDS: odds}
            made = fabricated(study, (10.0, 3.0, 12.0), base=20.0 + value)
            reports.append(replace(made, contrasts=asked))
            studies.append(study)
    return Reading(replace(series, studies=tuple(studies)), tuple(reports), (), "")


def test_pace_shows_learning_curves_and_rescue_on_both_scales():
    figure = pace.pace(made_up())
    drawn = " ".join(check(figure, style.PAGE))
    assert all(text in drawn for text in ("rescue, points", "rescue, log-odds", "images seen", "native, scratch"))
    curves, points, odds = figure.axes[0], figure.axes[2], figure.axes[4]
    scratch = curves.lines[0]
    assert (list(scratch.get_xdata()), list(scratch.get_ydata())) == ([500, 2000, 10000], [28.0, 22.0, 14.0])
    for axes, scale in ((points, 1), (odds, 1 / 20)):
        assert axes.lines[1].get_ydata() == pytest.approx([8 * scale, 2 * scale, -6 * scale])
    hollow = [line.get_markerfacecolor() == "white" for line in points.lines if len(line.get_xdata()) == 1]
    assert hollow == [False, True, False]


def test_pace_of_one_teacher_is_a_column():
    check(pace.pace(made_up(("dinov2_s",))))
