"""Gain from different losses between the maps, over the weight of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import ArmResult, Reading, Report


@style.drawn
def losses(reading: Reading) -> Figure:
    """Draw points above the baseline over the weight: a line with intervals for each loss, a panel for each teacher."""
    groups = grids.by_teacher(reading)
    looks = marks.looks(list(dict.fromkeys(_loss(row) for r in reading.reports for row in marks.contrasted(r))))
    figure, panels, width = grids.panels(list(groups))
    for axes, reports in zip(panels, groups.values(), strict=True):
        for report in reports:
            _draw(axes, report, looks)
        axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
        axes.set_xlabel("weight of the loss")
    baseline = reading.reports[0].rows[0].arm
    grids.ylabel(panels, f"top-1 points minus {baseline}")
    every = [row.contrast_or_raise() for report in reading.reports for row in marks.contrasted(report)]
    keys = [marks.key(look, name) for name, look in looks.items()]
    note = f"losses differ in scale; {captions.filling(every)}"
    style.finish(figure, captions.caption(reading, width), keys, note)
    return figure


def _draw(axes: Axes, report: Report, looks: dict[str, marks.Look]) -> None:
    rows = marks.contrasted(report)
    weights = sorted({_weight(row) for row in rows})
    # Offset the bars of equal weight a little.
    apart = (weights[-1] / weights[0]) ** 0.015 if len(weights) > 1 else 1.01
    for i, (loss, look) in enumerate(looks.items()):
        mine = sorted((row for row in rows if _loss(row) == loss), key=_weight)
        xs = [_weight(row) * apart ** (i - (len(looks) - 1) / 2) for row in mine]
        axes.plot(xs, [row.contrast_or_raise().value for row in mine], color=look[0])
        for x, row in zip(xs, mine, strict=True):
            marks.upright(axes, x, row.contrast_or_raise(), look)
    grids.ticks(axes, weights, log=True)


def _loss(row: ArmResult) -> str:
    return row.arm.rpartition(" x")[0]


def _weight(row: ArmResult) -> float:
    return float(row.arm.rpartition(" x")[2])
