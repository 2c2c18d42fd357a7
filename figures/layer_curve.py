"""Gain against the number of blocks whose attention is transferred, counted from the top, the bottom or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from atdiag.study.protocol import ArmResult, Reading, Report

_ENDS = {"bottom": (style.BLUE, "o"), "top": (style.VERMILLION, "s")}


@style.drawn
def layer_curve(report: Report) -> Figure:
    """Draw points above the baseline (k = 0) over k, a line for each end; bands: the intervals of these contrasts."""
    figure, axes = style.canvas(height=1.95)
    axes.grid(visible=False, axis="x")
    _draw(axes, report)
    axes.set_ylabel(_points(report))
    axes.set_xlabel(f"k\n{captions.levels([report])}")
    style.finish(figure, captions.caption(report), _keys([report]), _note([report], style.COLUMN))
    return figure


@style.drawn
def layer_curves(reading: Reading) -> Figure:
    """Draw the same for several teachers, a panel for each."""
    groups = grids.by_teacher(reading)
    figure, panels, width = grids.panels(list(groups), height=1.8)
    for axes, reports in zip(panels, groups.values(), strict=True):
        for report in reports:
            _draw(axes, report)
        axes.set_xlabel(f"k\n{captions.levels(reports)}")
    grids.ylabel(panels, _points(reading.reports[0]))
    style.finish(
        figure, captions.caption(reading, width), _keys(list(reading.reports)), _note(list(reading.reports), width)
    )
    return figure


def _points(report: Report) -> str:
    return f"top-1 points minus {report.rows[0].arm}"


def _draw(axes: Axes, report: Report) -> None:
    for end, points in _curves(report).items():
        ks, found = [k for k, _ in points], [row.contrast for _, row in points]
        low, high, value = ([getattr(e, what) if e else 0.0 for e in found] for what in ("low", "high", "value"))
        colour, marker = _ENDS[end]
        axes.fill_between(ks, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(ks, value, color=colour, zorder=3)
        for k, estimate in zip(ks, found, strict=True):
            if estimate is not None:
                marks.point(axes, k, estimate.value, colour, marker, clear=estimate.clear, size=3.2)
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
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
    return [marks.key(_ENDS[end], f"from the {end}") for end in ends]


def _note(reports: list[Report], width: float) -> str:
    every = [row.contrast_or_raise() for report in reports for row in marks.contrasted(report)]
    what = f"k: blocks whose attention is transferred ({reports[0].study.options['transfer']})"
    return f"{what}{'; ' if width > style.COLUMN else chr(10)}{captions.filling(every)}"
