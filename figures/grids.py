"""Layout with a panel for each teacher, all with the same vertical axis."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from figures import captions, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report


def by_teacher(reading: Reading) -> dict[str, list[Report]]:
    """Return the reports of each teacher, by its name in the panel's title."""
    out: dict[str, list[Report]] = {}
    for name, report in zip(captions.teachers(reading.reports), reading.reports, strict=True):
        out.setdefault(name, []).append(report)
    return out


def panels(names: Sequence[str], height: float = 1.55) -> tuple[Figure, list[Axes], float]:
    """Create a figure, and return it with its axes and width: a column for one panel, the page for several.

    Panels have titles if there are several; otherwise the caption names the teacher. height: of a panel, in inches.
    """
    count = len(names)
    columns = count if count <= 4 else 3 if count <= 6 else 4
    rows = ceil(count / columns)
    width = style.COLUMN if count == 1 else style.PAGE
    most = int((width / columns - 0.35) * 17)
    titles = [textwrap.fill(name, most) for name in names]
    lines = max(title.count("\n") for title in titles)
    figure, every = style.panels(rows, columns, rows * (height + 0.15 + 0.12 * lines), width, sharey=True)
    for spare in every[count:]:
        spare.remove()
    for axes, title in zip(every, titles, strict=False):
        axes.grid(visible=False, axis="x")
        if count > 1:
            axes.set_title(title, loc="left", pad=3)
    return figure, every[:count], width


def ylabel(panels: Sequence[Axes], text: str) -> None:
    """Label the vertical axis once for each row."""
    for axes in panels:
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel(text)


def beside(place: float, places: Sequence[float], which: int, count: int, log: bool) -> float:
    """Return the offset of one of several marks at the same position, so that they stand side by side around it."""
    low, high = min(places), max(places)
    step = (which - (count - 1) / 2) * 0.015
    return place * (high / low) ** step if log else place + (high - low) * step


def ticks(axes: Axes, places: Sequence[float], log: bool) -> None:
    """Set ticks at measured positions, as many as their labels have room for; optionally on a logarithmic axis."""
    from math import log10

    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    along = {place: log10(place) if log else place for place in sorted(set(places))}
    least = (max(along.values()) - min(along.values())) / 9
    first, *others = along
    kept = [first]
    for place in others:
        room = least * max(1.0, len(f"{place:g}") / 2.5)
        while place == others[-1] and len(kept) > 1 and along[place] - along[kept[-1]] < room:
            kept.pop()  # prefer a label at the last position to one just before it
        if along[place] - along[kept[-1]] >= room:
            kept.append(place)
    axes.set_xticks(kept, [f"{place:g}" for place in kept])
