"""Gain against a number of parts whose attention is transferred: of blocks, from the top, the bottom or both.

:class:`Curves` says what is counted; ``head_curve`` draws heads by the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from atdiag.study.protocol import ArmResult, Reading, Report


@dataclass(frozen=True)
class Curves:
    """What curves count, and their lines by the first word of the arms."""

    looks: Mapping[str, marks.Look]
    option: str
    """The study's option that names the lines."""
    key: str
    """Text of the key before the line's name."""
    counted: str


_ENDS = Curves({"bottom": (style.BLUE, "o"), "top": (style.VERMILLION, "s")}, "from", "from the ", "blocks")


@style.drawn
def layer_curve(report: Report) -> Figure:
    """Draw points above the baseline (k = 0) over k, a line for each end; bands: the intervals of these contrasts."""
    return one(report, _ENDS)


@style.drawn
def layer_curves(reading: Reading) -> Figure:
    """Draw the same for several teachers, a panel for each."""
    return several(reading, _ENDS)


def one(report: Report, kind: Curves) -> Figure:
    """Draw the curves of a study."""
    figure, axes = style.canvas(height=1.95)
    axes.grid(visible=False, axis="x")
    _draw(axes, report, kind)
    axes.set_ylabel(_points(report))
    axes.set_xlabel(f"k\n{captions.levels([report])}")
    style.finish(figure, captions.caption(report), _keys([report], kind), _note([report], style.COLUMN, kind))
    return figure


def several(reading: Reading, kind: Curves) -> Figure:
    """Draw the curves of several teachers, a panel for each."""
    groups = grids.by_teacher(reading)
    figure, panels, width = grids.panels(list(groups), height=1.8)
    for axes, reports in zip(panels, groups.values(), strict=True):
        for report in reports:
            _draw(axes, report, kind)
        axes.set_xlabel(f"k\n{captions.levels(reports)}")
    grids.ylabel(panels, _points(reading.reports[0]))
    every = list(reading.reports)
    style.finish(figure, captions.caption(reading, width), _keys(every, kind), _note(every, width, kind))
    return figure


def _points(report: Report) -> str:
    return f"top-1 points minus {report.rows[0].arm}"


def _draw(axes: Axes, report: Report, kind: Curves) -> None:
    for end, points in _curves(report, kind).items():
        ks, found = [k for k, _ in points], [row.contrast for _, row in points]
        low, high, value = ([getattr(e, what) if e else 0.0 for e in found] for what in ("low", "high", "value"))
        colour, marker = kind.looks[end]
        axes.fill_between(ks, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(ks, value, color=colour, zorder=3)
        for k, estimate in zip(ks, found, strict=True):
            if estimate is not None:
                marks.point(axes, k, estimate.value, colour, marker, clear=estimate.clear, size=3.2)
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    grids.ticks(axes, list(report.study.curve.values()), log=False)


def _curves(report: Report, kind: Curves) -> dict[str, list[tuple[int, ArmResult]]]:
    """Return the arms by k for each line, such as each end from which blocks are counted; none and all belong to both.

    Raises ValueError for arms without a position on the axis.
    """
    places = report.study.curve
    if missing := [row.arm for row in report.rows if row.arm not in places]:
        raise ValueError(f"a curve needs a place for every arm, and {', '.join(missing)} has none")
    ends = [end for end in kind.looks if any(arm.startswith(f"{end} ") for arm in places)]
    asked = report.study.options[kind.option].split(",")
    ends = ends or [end for end in kind.looks if end in asked] or [next(iter(kind.looks))]
    others = {end: [f"{other} " for other in kind.looks if other != end] for end in ends}
    return {
        end: sorted(
            ((places[row.arm], row) for row in report.rows if not row.arm.startswith(tuple(others[end]))),
            key=lambda point: point[0],
        )
        for end in ends
    }


def _keys(reports: list[Report], kind: Curves) -> list[Line2D]:
    ends = [end for end in kind.looks if any(end in _curves(report, kind) for report in reports)]
    return [marks.key(kind.looks[end], f"{kind.key}{end}") for end in ends]


def _note(reports: list[Report], width: float, kind: Curves) -> str:
    every = [row.contrast_or_raise() for report in reports for row in marks.contrasted(report)]
    what = f"k: {kind.counted} whose attention is transferred ({reports[0].study.options['transfer']})"
    return f"{what}{'; ' if width > style.COLUMN else chr(10)}{captions.filling(every)}"
