"""Layout with a row for each study, grouped by its teacher's family, for figures that compare many studies."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atdiag.networks.registry import teachers
from atdiag.networks.registry.specimens import is_specimen
from figures import captions, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Report

_LINE, _MARK, _GAP = 0.105, 0.08, 0.09
"""Heights of a line of a label, of a mark, and of the gap between rows, in inches."""


@dataclass(frozen=True)
class Place:
    """A study's position: the middle and the height of its row, in inches from the top."""

    report: Report
    middle: float
    height: float


def families(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Return the studies of each family, in order of first occurrence.

    Unregistered models form the family "timm", specimens a group of their own.
    """
    registry = teachers.registry()
    out: dict[str, list[Report]] = {}
    for report in reports:
        found = registry.get(report.study.teacher.name.partition("@")[0])
        other = "specimens" if is_specimen(report.study.teacher) else "timm"
        out.setdefault(found.title if found else other, []).append(report)
    return out


def canvas(
    reports: Sequence[Report], marks: Callable[[Report], int], most: int = 24
) -> tuple[Figure, Axes, list[Place]]:
    """Create a figure with a row for each study and an unused horizontal axis.

    marks: number of marks in a study's row, one below the other. Several families are separated by a title and a thin
    line each. most: maximum characters per line of a label.
    """
    groups = families(reports)
    names = {
        id(report): textwrap.fill(name, most) for report, name in zip(reports, captions.studies(reports), strict=True)
    }
    # A title should not be wider than the labels below it.
    widest = max(12, *(len(line) for name in names.values() for line in name.splitlines()))
    places: list[Place] = []
    heads, lines, labels = [], [], []
    y = 0.04
    for title, members in groups.items():
        if len(groups) > 1:
            if places:
                lines.append(y + 0.02)
                y += 0.04
            label = textwrap.fill(title, widest)
            height = _LINE * (label.count("\n") + 1) + 0.03
            heads.append((y + height / 2, label))
            y += height
        for report in members:
            label = names[id(report)]
            height = max(_LINE * (label.count("\n") + 1), _MARK * marks(report)) + _GAP
            places.append(Place(report, y + height / 2, height))
            labels.append(label)
            y += height
    figure, axes = style.canvas(height=y + 0.45)
    ticks = [*((place.middle, label, "normal") for place, label in zip(places, labels, strict=True))]
    ticks += [(middle, label, "bold") for middle, label in heads]
    axes.set_yticks([middle for middle, _, _ in ticks], [label for _, label, _ in ticks])
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_fontweight(weight)
    axes.set_ylim(y + 0.04, 0)
    for line in lines:
        axes.axhline(line, color=style.GREY, lw=0.5, ls=(0, (2, 2)), zorder=1)
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes, places


def spread(place: Place, count: int) -> list[float]:
    """Return the positions of this many marks in a row, from the top."""
    step = (place.height - _GAP) / count
    return [place.middle + step * (i - (count - 1) / 2) for i in range(count)]


def column(
    axes: Axes,
    head: str,
    places: Sequence[Place],
    texts: Sequence[str],
    before: float = 0.0,
    bold: Sequence[bool] = (),
) -> float:
    """Write small numbers right of the axes, below a heading; return the width used so far, in points.

    before: width used by earlier columns, in points.
    """
    right = before + 6 + 3.5 * max(map(len, [head, *texts]))
    options: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 6}
    for place, text, strong in zip(places, texts, bold or [False] * len(texts), strict=True):
        look: dict[str, Any] = {"weight": "bold", "color": style.INK} if strong else {"color": style.GREY}
        where, units = (1, place.middle), ("axes fraction", "data")
        axes.annotate(text, where, (right, 0), xycoords=units, va="center", **look, **options)
    axes.annotate(head, (1, 1), (right, 1), xycoords="axes fraction", va="bottom", color=style.GREY, **options)
    return right
