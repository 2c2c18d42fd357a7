"""Gain over training length: each length is a separate training with its own baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report


@style.drawn
def epochs(reading: Reading) -> Figure:
    """Draw points above the baseline of the same length, with intervals: a line per arm, a panel per teacher."""
    groups = grids.by_teacher(reading)
    looks = marks.arms(reading.reports)
    figure, panels, width = grids.panels(list(groups), height=1.8)
    for axes, reports in zip(panels, groups.values(), strict=True):
        _draw(axes, sorted(reports, key=_length), looks)
        axes.set_xlabel(f"epochs\n{captions.levels(reports)}")
    grids.ylabel(panels, f"top-1 points minus {reading.reports[0].rows[0].arm}")
    keys = [marks.key(look, name) for name, look in looks.items()]
    every = [row.contrast_or_raise() for report in reading.reports for row in marks.contrasted(report)]
    style.finish(figure, captions.caption(reading, width), keys, captions.filling(every))
    return figure


def _draw(axes: Axes, reports: list[Report], looks: dict[str, marks.Look]) -> None:
    lengths = [_length(report) for report in reports]
    log = max(lengths) >= 4 * min(lengths)
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    for i, (name, look) in enumerate(looks.items()):
        having = [(x, r.row(name).contrast_or_raise()) for x, r in zip(lengths, reports, strict=True) if _has(r, name)]
        xs = [grids.beside(x, lengths, i, len(looks), log) for x, _ in having]
        axes.plot(xs, [estimate.value for _, estimate in having], color=look[0])
        for x, (_, estimate) in zip(xs, having, strict=True):
            marks.upright(axes, x, estimate, look)
    grids.ticks(axes, lengths, log)


def _has(report: Report, arm: str) -> bool:
    return any(row.arm == arm for row in report.rows)


def _length(report: Report) -> int:
    return int(report.study.options["epochs"])
