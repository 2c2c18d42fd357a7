"""Accuracy over the number of blocks whose attention is transferred, counted from the top, the bottom or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from atdiag.study.protocol import ArmResult, Reading, Report

_ENDS = {"bottom": (style.BLUE, "o"), "top": (style.VERMILLION, "s")}


def layer_curve(report: Report) -> Figure:
    """Draw top-1 over k, a line for each end; bands are intervals of the contrast with the baseline (k = 0)."""
    figure, axes = style.canvas(height=1.6)
    axes.grid(visible=False, axis="x")
    _draw(axes, report)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_xlabel("k")
    style.finish(figure, captions.caption(report), _keys([report]), _note([report], style.COLUMN))
    return figure


def layer_curves(reading: Reading) -> Figure:
    """Draw the same for several teachers, a panel for each."""
    groups = grids.by_teacher(reading)
    figure, panels, width = grids.panels(list(groups))
    for axes, reports in zip(panels, groups.values(), strict=True):
        for report in reports:
            _draw(axes, report)
        axes.set_xlabel("k")
    grids.ylabel(panels, "top-1 accuracy, %")
    style.finish(
        figure, captions.caption(reading, width), _keys(list(reading.reports)), _note(list(reading.reports), width)
    )
    return figure


def _draw(axes: Axes, report: Report) -> None:
    baseline = report.rows[0].top1
    for end, points in _curves(report).items():
        ks, rows = [k for k, _ in points], [row for _, row in points]
        low = [baseline + (row.contrast.low if row.contrast else 0) for row in rows]
        high = [baseline + (row.contrast.high if row.contrast else 0) for row in rows]
        colour, marker = _ENDS[end]
        axes.fill_between(ks, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(ks, [row.top1 for row in rows], f"{marker}-", color=colour, ms=3.2, mfc="white", mew=0.9, zorder=3)
        for k, row in points:
            if row.contrast is not None and row.contrast.clear:
                marks.point(axes, k, row.top1, colour, marker, clear=True, size=3.2)
    axes.axhline(baseline, color=style.INK, lw=0.9, ls=(0, (4, 2)))
    if report.reference is not None:
        axes.axhline(report.reference.top1, color=style.GREY, lw=0.9, ls=(0, (1, 1.5)))
    grids.ticks(axes, list(report.study.curve.values()), log=False)


def _curves(report: Report) -> dict[str, list[tuple[int, ArmResult]]]:
    """Return the arms by k for each end from which blocks are counted; none and all blocks belong to both ends.

    Raises ValueError for arms without a position on the axis.
    """
    places = report.study.curve
    if missing := [row.arm for row in report.rows if row.arm not in places]:
        raise ValueError(f"a curve needs a place for every arm, and {', '.join(missing)} has none")
    ends = [end for end in _ENDS if any(arm.startswith(f"{end} ") for arm in places)]
    ends = ends or [end for end in _ENDS if end == report.study.options["from"]] or ["bottom"]
    others = {end: [f"{other} " for other in _ENDS if other != end] for end in ends}
    return {
        end: sorted(
            ((places[row.arm], row) for row in report.rows if not row.arm.startswith(tuple(others[end]))),
            key=lambda point: point[0],
        )
        for end in ends
    }


def _keys(reports: list[Report]) -> list[Line2D]:
    ends = [end for end in _ENDS if any(end in _curves(report) for report in reports)]
    keys = [marks.key(_ENDS[end], f"from the {end}") for end in ends]
    keys.append(marks.key((style.INK, ""), reports[0].rows[0].arm, ls=(0, (4, 2)), lw=0.9))
    if any(report.reference for report in reports):
        keys.append(marks.key((style.GREY, ""), "teacher", ls=(0, (1, 1.5)), lw=0.9))
    return keys


def _note(reports: list[Report], width: float) -> str:
    every = [row.contrast_or_raise() for report in reports for row in marks.contrasted(report)]
    what = f"k: blocks whose attention is transferred ({reports[0].study.options['transfer']})"
    return f"{what}{'; ' if width > style.COLUMN else chr(10)}{captions.filling(every)}"
