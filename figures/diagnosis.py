"""Every contrast that a diagnosis looked at, with intervals: what helps, and what is accused."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.stats.contrasts import Estimate

Kind = Literal["transfer", "accused", "cleared", "not accused", "sufficient"]
_COLOURS: dict[Kind, str] = {
    "transfer": style.BLUE,
    "accused": style.VERMILLION,
    "cleared": style.GREEN,
    "not accused": style.GREY,
    "sufficient": style.BLUE,
}


@dataclass(frozen=True)
class Row:
    """One contrast of a diagnosis."""

    name: str
    estimate: Estimate
    kind: Kind
    bound: float = 0.0
    """The value that it is compared with, in points."""


@style.drawn
def diagnosis(title: str, rows: Sequence[Row], margin: float) -> Figure:
    """Draw a row for each contrast: its 95 % interval, the margin shaded, and what it is compared with as a tick."""
    labels = [textwrap.fill(row.name, 38) for row in rows]
    heights = [1 + 0.6 * label.count("\n") for label in labels]
    title = style.wrapped(title, 56)
    figure, axes = style.canvas(height=0.8 + 0.2 * sum(heights) + 0.14 * title.count("\n"))
    place, places = 0.0, []
    for height in heights:
        places.append(place + height / 2)
        place += height
    axes.axvspan(-margin, margin, color="#EEEEEE", lw=0, zorder=0)
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    for row, y in zip(rows, places, strict=True):
        colour = _COLOURS[row.kind]
        axes.plot([row.estimate.low, row.estimate.high], [y, y], color=colour, solid_capstyle="butt", zorder=3)
        fill = "white" if row.kind == "not accused" else colour
        axes.plot(row.estimate.value, y, "o", ms=4.5, mfc=fill, mec=colour, mew=1.0, zorder=4)
        if row.bound:
            axes.plot([row.bound] * 2, [y - 0.35, y + 0.35], color=style.INK, lw=1.0, zorder=2)
    axes.set_yticks(places, labels)
    axes.set_ylim(place, 0)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(visible=False, axis="y")
    found = dict.fromkeys(row.kind for row in rows)
    names = {style.BLUE: "blue: transfer", style.VERMILLION: "red: accused", style.GREEN: "green: cleared"}
    said = [names[colour] for colour in dict.fromkeys(_COLOURS[kind] for kind in found) if colour in names]
    said += ["open: not accused"] if "not accused" in found else []
    key = textwrap.fill("; ".join(said), 54)
    below = f"top-1 points, 95 % intervals; shaded: margin of {margin:g} points\n{key}"
    style.describe(figure, title, below)
    return figure
