"""What each variant of a student changes of a transfer's gain, in points and in log-odds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.study.protocol import Reading, Report
from figures import captions, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {"points": "top-1 points", "log-odds": "log-odds"}


@style.drawn
def gain(shown: Report | Reading) -> Figure:
    """Draw a row for each variant, one panel for points and one for log-odds; a row of panels for each teacher."""
    reports = shown.reports if isinstance(shown, Reading) else (shown,)
    tallest = max(len(report.contrasts) for report in reports) // 2
    figure, panels = style.panels(
        len(reports), 2, len(reports) * (0.55 + 0.19 * tallest), style.PAGE, sharex="col", sharey="row"
    )
    look = marks.looks(["change"])["change"]
    for row, report in enumerate(reports):
        names = [name for name, one in report.contrasts.items() if one.scale == "points"]
        for axes, scale in zip(panels[2 * row : 2 * row + 2], _AXES, strict=True):
            found = [one for one in report.contrasts.values() if one.scale == scale]
            axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
            for y, estimate in enumerate(found):
                marks.across(axes, estimate, -y, look)
            _ticks(axes, [_label(name, report) for name in names])
        if len(reports) > 1:
            panels[2 * row].set_title(captions.teachers(reports)[row], loc="left", pad=3)
    for axes, label in zip(panels[-2:], _AXES.values(), strict=True):
        axes.set_xlabel(label)
    every = [estimate for report in reports for estimate in report.contrasts.values()]
    transfer = reports[0].study.options["transfer"]
    scratch, passed = reports[0].rows[:2]
    standard = f"; standard: {_levels(scratch.top1, passed.top1)}" if len(reports) == 1 else ""
    note = (
        f"(variant + {transfer} - variant) - (standard + {transfer} - {scratch.arm}); in brackets: top-1 % from "
        f"scratch, with transfer{standard}; {captions.filling(every)}"
    )
    style.finish(figure, captions.caption(shown, style.PAGE), [], note)
    return figure


def _label(name: str, report: Report) -> str:
    variant = name.removesuffix(" changes the gain")
    scratch = report.row(f"{variant}, scratch").top1
    passed = report.row(f"{variant} + {report.study.options['transfer']}").top1
    return f"{variant} ({_levels(scratch, passed)})"


def _levels(scratch: float, passed: float) -> str:
    return f"{scratch:.1f}, {passed:.1f}"


def _ticks(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks([-y for y in range(len(labels))], labels)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.grid(visible=False, axis="y")
