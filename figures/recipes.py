"""Facts about each teacher's pre-training and architecture, next to a student's gain from its attention."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atdiag.networks.registry import teachers
from figures import captions, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import ArmResult, Reading, Report

_FACTS = ("labels", "text", "momentum", "masking", "target")
_WORDS = {"target": "other target"}
_OBJECTIVE, _DATA, _MARK = 1.45, 0.75, 0.17
"""Relative widths of the columns: in inches if there are many."""

_LINE = 0.105
"""Height of a line of text, in inches."""


@style.drawn
def recipes(reading: Reading) -> Figure:
    """Draw a row for each teacher, by decreasing gain; filled: has it, empty: lacks it, no mark: unknown.

    The gain is that of the first arm after the baseline. Blue: clearly above, red: clearly below, grey: undecided.
    """
    reports = sorted(reading.reports, key=lambda report: -_outcome(report).contrast_or_raise().value)
    names = [textwrap.fill(name, 24) for name in captions.teachers(reports)]
    facts = [teachers.registry().get(report.study.teacher.name.partition("@")[0]) for report in reports]
    words = [
        (textwrap.fill(row.objective, 27), textwrap.fill(row.data, 12)) if row and row.objective else ("?", "?")
        for row in facts
    ]
    parts = list(dict.fromkeys(part for report in reports for part in _parts(report)))
    lines = [max(text.count("\n") for text in (name, *pair)) + 1 for name, pair in zip(names, words, strict=True)]
    heights = [_LINE * count + 0.08 for count in lines]
    middles = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    total = sum(heights)

    figure, (left, right) = style.panels(1, 2, 0.0, style.PAGE, width_ratios=[1.0, 3.0])
    figure.set_size_inches(style.PAGE, total + 1.15)
    for axes in (left, right):
        axes.set_ylim(total, 0)
        for edge in (sum(heights[:i]) for i in range(1, len(heights))):
            axes.axhline(edge, color=style.GREY, lw=0.3, zorder=0)
    _gains(left, reports, middles, names)
    known = [
        [None if row is None or not row.objective else bool(getattr(row, fact)) for fact in _FACTS]
        + [part in _parts(report) for part in parts]
        for row, report in zip(facts, reports, strict=True)
    ]
    borrowed = [teachers.is_miniature(report.study.teacher) for report in reports]
    _table(right, middles, words, known, parts, borrowed)
    unknown = any(objective == "?" for objective, _ in words)
    estimates = [_outcome(report).contrast_or_raise() for report in reports]
    keys = [
        marks.key((style.BLUE, "o"), "clear gain"),
        marks.key((style.VERMILLION, "o"), "clear loss"),
        marks.key((style.GREY, "o"), "undecided", mfc="white"),
        marks.key((style.INK, "s"), "has it", ls=""),
        marks.key((style.GREY, "s"), "has not", ls="", mfc="white", mew=0.5),
    ]
    style.finish(figure, captions.caption(reading, style.PAGE), keys, _note(reports, estimates, parts, unknown))
    return figure


def _parts(report: Report) -> tuple[str, ...]:
    """Return the parts of a teacher's network that the plain ViT lacks."""
    network = report.study.teacher.network
    return (*network.components, *network.differences, *(() if network.class_token else ("no_class_token",)))


def _outcome(report: Report) -> ArmResult:
    return marks.contrasted(report)[0]


def _gains(axes: Axes, reports: Sequence[Report], middles: Sequence[float], names: Sequence[str]) -> None:
    for report, y in zip(reports, middles, strict=True):
        estimate = _outcome(report).contrast_or_raise()
        axes.plot([estimate.low, estimate.high], [y, y], color=_colour(estimate), solid_capstyle="butt")
        marks.point(axes, estimate.value, y, _colour(estimate), "o", estimate.clear)
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_yticks(list(middles), list(names))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(f"{_outcome(reports[0]).arm}: top-1 points\nminus {reports[0].rows[0].arm}")


def _colour(estimate: Estimate) -> str:
    return style.GREY if not estimate.clear else style.BLUE if estimate.value > 0 else style.VERMILLION


def _table(
    axes: Axes,
    middles: Sequence[float],
    words: Sequence[tuple[str, str]],
    known: Sequence[Sequence[bool | None]],
    parts: Sequence[str],
    borrowed: Sequence[bool],
) -> None:
    """Draw the objective and data in words, then a mark for each fact of pre-training and each native component.

    borrowed: whether the pre-training facts belong to the published network that a miniature represents.
    """
    start = _OBJECTIVE + _DATA + _MARK
    places = [start + _MARK * (i + (i >= len(_FACTS))) for i in range(len(_FACTS) + len(parts))]
    for y, (objective, data), row, other in zip(middles, words, known, borrowed, strict=True):
        ink = style.GREY if other else style.INK
        axes.text(0, y, objective, va="center", fontsize=6, color=ink)
        axes.text(_OBJECTIVE, y, data, va="center", fontsize=6, color=ink)
        for i, (x, has) in enumerate(zip(places, row, strict=True)):
            if has is not None:
                colour = ink if i < len(_FACTS) else style.INK
                face, edge = (colour, colour) if has else ("white", style.GREY)
                axes.plot(x, y, "s", ms=4.5, mfc=face, mec=edge, mew=0.5)
    heads = [_WORDS.get(fact, fact) for fact in _FACTS] + [part.replace("_", " ") for part in parts]
    axes.xaxis.tick_top()
    axes.set_xticks([0, _OBJECTIVE, *places], ["objective", "data", *heads], rotation=90)
    for tick in axes.get_xticklabels()[:2]:
        tick.set(rotation=0, ha="left")
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlim(-0.03, max(places) + _MARK)
    if parts:
        axes.axvline(places[len(_FACTS)] - _MARK, color=style.GREY, lw=0.5, ls=(0, (2, 2)))


def _note(reports: Sequence[Report], estimates: Sequence[Estimate], parts: Sequence[str], unknown: bool) -> str:
    said = ["dashed line: pre-training left, native components right" if parts else "no native components"]
    if any(teachers.is_miniature(report.study.teacher) for report in reports):
        said.append("grey: of the published teachers; all miniatures share one recipe")
    if unknown:
        said.append("?: not in the registry")
    return "\n".join([*textwrap.wrap("; ".join(said), 140), f"circles {captions.filling(estimates)}"])
