"""Learning curves of a rescue's four arms over training budgets, and the rescue itself, in points and in log-odds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.study.protocol import BASELINE
from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report

_ROWS = ("top-1 %", "rescue, points", "rescue, log-odds")


@style.drawn
def pace(reading: Reading) -> Figure:
    """Draw a column of panels for each teacher: accuracy over images seen, and below it rescue on both scales."""
    groups = grids.by_teacher(reading)
    columns = len(groups)
    width = style.COLUMN if columns == 1 else style.PAGE
    figure, panels = style.panels(len(_ROWS), columns, 1.25 * len(_ROWS) + 0.3, width, sharex="col", sharey="row")
    looks = marks.looks([row.arm for row in reading.reports[0].rows])
    for column, (name, reports) in enumerate(groups.items()):
        ordered = sorted(reports, key=_seen)
        mine = panels[column::columns]
        _curves(mine[0], ordered, looks)
        for axes, which in zip(mine[1:], range(2), strict=True):
            _rescue(axes, ordered, list(ordered[0].contrasts)[which])
        for axes in mine:
            axes.grid(visible=False, axis="x")
            grids.ticks(axes, [_seen(report) for report in ordered], log=len(ordered) > 1)
        mine[-1].set_xlabel("images seen")
        if columns > 1:
            mine[0].set_title(name, loc="left", pad=3)
    for row, label in enumerate(_ROWS):
        panels[row * columns].set_ylabel(label)
    keys = [marks.key(look, name) for name, look in looks.items()]
    every = [estimate for report in reading.reports for estimate in report.contrasts.values()]
    note = f"rescue: (native + transfer - native) - (standard + transfer - {BASELINE}); {captions.filling(every)}"
    style.finish(figure, captions.caption(reading, width), keys, note)
    return figure


def _curves(axes: Axes, reports: list[Report], looks: dict[str, marks.Look]) -> None:
    seen = [_seen(report) for report in reports]
    for name, (colour, marker) in looks.items():
        axes.plot(seen, [report.row(name).top1 for report in reports], color=colour, marker=marker, ms=3)


def _rescue(axes: Axes, reports: list[Report], name: str) -> None:
    seen, found = [_seen(report) for report in reports], [report.contrasts[name] for report in reports]
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    axes.plot(seen, [one.value for one in found], color=style.GREY, lw=0.9)
    for x, estimate in zip(seen, found, strict=True):
        marks.upright(axes, x, estimate, (style.INK, "o"))


def _seen(report: Report) -> int:
    return report.study.curve[BASELINE]
