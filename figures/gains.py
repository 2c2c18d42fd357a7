"""Gain of a student from each teacher over the baseline: the arms of many studies on one axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, marks, rows, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading


@style.drawn
def gains(reading: Reading) -> Figure:
    """Draw points above the baseline, a row for each study, grouped by family; a colour and a marker for each arm.

    Filled: clear of zero; open: not. Right: accuracy of the baseline, and of the teacher if its head fits the task.
    """
    reports = reading.reports
    looks = marks.arms(reports)
    figure, axes, places = rows.canvas(reports, lambda report: len(marks.contrasted(report)))
    for place in places:
        arms = marks.contrasted(place.report)
        for row, y in zip(arms, rows.spread(place, len(arms)), strict=True):
            marks.across(axes, row.contrast_or_raise(), y, looks[row.arm])
    baseline = reports[0].rows[0].arm
    taken = rows.column(axes, baseline, places, [f"{place.report.rows[0].top1:.1f}" for place in places])
    own = [place.report.reference for place in places]
    if any(own):
        rows.column(axes, "teacher", places, [f"{row.top1:.1f}" if row else "" for row in own], taken)
    axes.set_xlabel(f"top-1 points minus {baseline}")
    keys = [marks.key(look, name) for name, look in looks.items()]
    every = [row.contrast_or_raise() for report in reports for row in marks.contrasted(report)]
    style.finish(figure, captions.caption(reading), keys, f"{captions.filling(every)}\nright: top-1 accuracy, %")
    return figure
