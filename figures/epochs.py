"""Accuracy over the length of training: each length is a separate training with its own baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report


def epochs(reading: Reading) -> Figure:
    """Draw a panel for each teacher, a line for each arm; bars: intervals of arm minus baseline, around the line."""
    groups = grids.by_teacher(reading)
    looks = marks.arms(reading.reports)
    figure, panels, width = grids.panels(list(groups))
    for axes, reports in zip(panels, groups.values(), strict=True):
        _draw(axes, sorted(reports, key=_length), looks)
        axes.set_xlabel("epochs")
    grids.ylabel(panels, "top-1 accuracy, %")
    keys = [marks.key(look, name) for name, look in looks.items()]
    keys.append(marks.key((style.INK, ""), reading.reports[0].rows[0].arm, ls=(0, (4, 2)), lw=0.9))
    if any(report.reference for report in reading.reports):
        keys.append(marks.key((style.GREY, ""), "teacher itself", ls=(0, (1, 1.5)), lw=0.9))
    every = [row.contrast_or_raise() for report in reading.reports for row in marks.contrasted(report)]
    style.finish(figure, captions.caption(reading, width), keys, captions.filling(every))
    return figure


def _draw(axes: Axes, reports: list[Report], looks: dict[str, marks.Look]) -> None:
    lengths = [_length(report) for report in reports]
    log = max(lengths) >= 4 * min(lengths)
    baselines = [report.rows[0].top1 for report in reports]
    axes.plot(lengths, baselines, color=style.INK, lw=0.9, ls=(0, (4, 2)), marker="_", ms=4)
    if reports[0].reference is not None:
        axes.axhline(reports[0].reference.top1, color=style.GREY, lw=0.9, ls=(0, (1, 1.5)))
    for name, look in looks.items():
        having = [(x, r.rows[0].top1, r.row(name)) for x, r in zip(lengths, reports, strict=True) if _has(r, name)]
        axes.plot([x for x, _, _ in having], [row.top1 for _, _, row in having], color=look[0])
        for x, base, row in having:
            marks.upright(axes, x, row.contrast_or_raise(), look, base)
    grids.ticks(axes, lengths, log)


def _has(report: Report, arm: str) -> bool:
    return any(row.arm == arm for row in report.rows)


def _length(report: Report) -> int:
    return int(report.study.options["epochs"])
