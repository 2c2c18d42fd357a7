"""The figure of blockwise shows the effect of each block, and its divergence."""

from dataclasses import replace

import pytest

from ablations import blockwise as planned
from atdiag.study.protocol import Reading
from figures import blockwise, style
from tests.drawings import check
from tests.studies import fabricated, lab


def made_up(teachers=("dinov2_s", "deit_s")) -> Reading:
    """Make a reading of teachers whose deeper blocks give more, and diverge more."""
    reports = []
    for teacher in teachers:
        series = planned.blockwise(lab(), teacher)
        made = fabricated(series.studies[0], [*(0.5 * block for block in range(12)), 20.0])
        scratch = replace(made.rows[0], numbers={f"JSD block {block}": 0.1 + 0.02 * block for block in range(12)})
        reports.append(replace(made, rows=(scratch, *made.rows[1:])))
    return Reading(replace(series, studies=tuple(one.study for one in reports)), tuple(reports), (), "")


def test_blockwise_shows_what_was_measured():
    figure = blockwise.blockwise(made_up())
    drawn = " ".join(check(figure, style.PAGE))
    assert all(text in drawn for text in ("block", "JSD, bits", "scratch: 50.0 %"))
    points = [float(line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert points == pytest.approx([0.5 * block for block in range(12)])
    assert figure.axes[2].lines[0].get_ydata() == pytest.approx([0.1 + 0.02 * block for block in range(12)])


def test_blockwise_of_one_teacher_is_a_column():
    check(blockwise.blockwise(made_up(("dinov2_s",))))
