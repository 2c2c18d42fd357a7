"""Gain over the student's size: each size has its own baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.study.protocol import METHODS
from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report


@style.drawn
def crosssize(reading: Reading) -> Figure:
    """Draw points above the baseline of the same size, with intervals: a colour per method, a panel per teacher.

    Below each size: the baseline's accuracy.
    """
    groups = grids.by_teacher(reading)
    looks = {name: look for name, look in marks.arms(reading.reports).items() if name in METHODS}
    figure, panels, width = grids.panels(list(groups), height=1.9)
    for axes, reports in zip(panels, groups.values(), strict=True):
        _draw(axes, reports, looks)
        own = next((report.reference for report in reports if report.reference is not None), None)
        axes.set_xlabel("size of the student" + (f"\nteacher: {own.top1:.1f} %" if own else ""))
    baseline = reading.reports[0].rows[0].arm
    grids.ylabel(panels, f"top-1 points minus {baseline}")
    keys = [marks.key(look, name, lw=0) for name, look in looks.items()]
    every = [row.contrast_or_raise() for report in reading.reports for row in report.rows if row.arm in looks]
    note = f"{captions.filling(every)}\nbelow each size: accuracy of its {baseline}"
    style.finish(figure, captions.caption(reading, width), keys, note)
    return figure


def _draw(axes: Axes, reports: list[Report], looks: dict[str, marks.Look]) -> None:
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    step = min(0.14, 0.6 / len(looks))
    for x, report in enumerate(reports):
        for i, (name, look) in enumerate(looks.items()):
            row = next((row for row in report.rows if row.arm == name), None)
            if row is not None:
                marks.upright(axes, x + (i - (len(looks) - 1) / 2) * step, row.contrast_or_raise(), look)
    names = [style.wrapped(report.study.options["size"], 12) for report in reports]
    accuracy = [f"{report.rows[0].top1:.1f} %" for report in reports]
    axes.set_xticks(range(len(reports)), [f"{name}\n{told}" for name, told in zip(names, accuracy, strict=True)])
    axes.set_xlim(-0.5, len(reports) - 0.5)
