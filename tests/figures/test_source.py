"""The figure of source shows what students gain from two kinds of pre-training, over architectures, at each budget."""

from dataclasses import replace

import pytest

from ablations import source as planned
from atdiag.study.protocol import Reading, Report
from figures import source, style
from tests.drawings import check
from tests.studies import estimate, fabricated, lab

FIRST, SECOND = "deit_s,dinov2_s,hub", "weak,gated,hub_2"


def made_up(gains=None, budgets="1000x4,2500x4", contrasts=None, probe=30.0) -> Reading:
    """Make a reading: gains of the arms by (architecture, kind, method), else 10 of supervised teachers, 4 of others.

    contrasts: points of the contrasts by name, else 6; log-odds are a twentieth.
    """
    series = planned.source(lab(), FIRST, SECOND, kinds="supervised,mae", budgets=budgets)
    reports = tuple(_reported(study, gains or {}, contrasts or {}, probe) for study in series.studies)
    return Reading(series, reports, (), " ".join(report.study.verdict(report) for report in reports))


def _reported(study, gains, contrasts, probe) -> Report:
    effects = [
        probe if arm.probed else gains.get(arm.name, 10.0 if "supervised" in arm.name else 4.0)
        for arm in study.arms[1:]
    ]
    found = {}
    for contrast in study.contrasts:
        value = contrasts.get(contrast.name.removesuffix(", log-odds"), 6.0)
        scale = 1 / 20 if contrast.scale == "log-odds" else 1.0
        found[contrast.name] = replace(estimate(scale * value, half=scale * 2), scale=contrast.scale)
    return replace(fabricated(study, effects, base=40.0), contrasts=found)


def test_source_shows_gains_over_architectures_in_a_panel_for_each_method_and_budget():
    reading = made_up({"hub (specimen), mae: distill": -3.0})
    figure = source.source(reading)
    drawn = " ".join(check(figure, style.PAGE)).replace("\n", " ")
    wanted = (
        "1,000 images x 4 epochs",
        "2,500 images",
        "supervised",
        "mae",
        "copy, points",
        "dinov2_s",
        "70.0 and 70.0",
    )
    assert all(text in drawn for text in wanted)
    assert len(figure.axes) == 4
    for axes, last in zip(figure.axes, (4, 4, -3, -3), strict=True):
        points = [float(line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
        assert points == pytest.approx([10, 10, 10, 4, 4, last])


def test_source_of_one_budget_is_a_column():
    check(source.source(made_up(budgets="500x1")))
