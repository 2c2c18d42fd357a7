"""What each block alone gives, beside the blocks' divergence from students that never saw the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.study.matching import HEAD_BY_HEAD
from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report


@style.drawn
def blockwise(reading: Reading) -> Figure:
    """Draw a column for each teacher: above, points by block alone; below, the divergence of students from scratch."""
    groups = grids.by_teacher(reading)
    columns = len(groups)
    width = style.COLUMN if columns == 1 else style.PAGE
    figure, panels = style.panels(2, columns, 3.0, width, sharex="col", sharey="row", height_ratios=(2, 1))
    for column, (name, (report, *_)) in enumerate(groups.items()):
        above, below = panels[column], panels[columns + column]
        _effects(above, report)
        _divergence(below, report)
        below.set_xlabel(f"block\n{captions.levels([report])}")
        if columns > 1:
            above.set_title(name, loc="left", pad=3)
    panels[0].set_ylabel(f"top-1 points minus {reading.reports[0].rows[0].arm}")
    panels[columns].set_ylabel("JSD, bits")
    every = [row.contrast_or_raise() for report in reading.reports for row in marks.contrasted(report)]
    note = (
        f"above: {reading.reports[0].study.options['transfer']} of one block alone; line: of all blocks; "
        f"below: maps of {reading.reports[0].rows[0].arm} from the teacher's; {captions.filling(every)}"
    )
    style.finish(figure, captions.caption(reading, width), [], note)
    return figure


def _effects(axes: Axes, report: Report) -> None:
    axes.grid(visible=False, axis="x")
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    axes.axhline(report.row("all blocks").contrast_or_raise().value, color=style.GREY, lw=0.8, ls="--", zorder=1)
    for name, block in report.study.curve.items():
        marks.upright(axes, block, report.row(name).contrast_or_raise(), (style.BLUE, "o"))
    grids.ticks(axes, list(report.study.curve.values()), log=False)


def _divergence(axes: Axes, report: Report) -> None:
    axes.grid(visible=False, axis="x")
    numbers = report.rows[0].numbers
    found = {block: numbers.get(f"{HEAD_BY_HEAD} {name}") for name, block in report.study.curve.items()}
    shown = {block: value for block, value in found.items() if value is not None}
    axes.plot(list(shown), list(shown.values()), color=style.VERMILLION, marker="s", ms=3)
    axes.set_ylim(bottom=0)
    grids.ticks(axes, list(report.study.curve.values()), log=False)
