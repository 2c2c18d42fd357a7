"""Forest plot of each arm minus the baseline and of the contrasts of interest, with intervals."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from figures import marks, style
from figures.captions import caption, filling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import Report


@style.drawn
def contrasts(report: Report) -> Figure:
    """Draw a forest plot. Filled: the interval covers seeds and images and excludes zero; open: otherwise."""
    arms = [(row.arm, row.contrast, f"{row.top1:.1f} %") for row in report.rows if row.contrast is not None]
    asked = [(name, estimate, "") for name, estimate in report.contrasts.items()]
    lines: list[tuple[str, Estimate, str]] = [*arms, *asked]
    labels = [_wrapped(name) for name, _, _ in lines]
    heights = [1 + 0.6 * label.count("\n") for label in labels]
    figure, axes = style.canvas(height=0.87 + 0.2 * sum(heights) + 0.12 * caption(report).count("\n"))

    small: dict[str, Any] = {"fontsize": 6.5, "color": style.GREY}
    place, places = 0.0, []
    for height in heights:
        places.append(place + height / 2)
        place += height
    for index, ((_, estimate, top1), y) in enumerate(zip(lines, places, strict=True)):
        colour = style.BLUE if index < len(arms) else style.VERMILLION
        marks.across(axes, estimate, y, (colour, "o"), size=4.5)
        axes.annotate(top1, (1.02, y), xycoords=("axes fraction", "data"), va="center", **small)
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axes.annotate("top-1", (1.02, 1), (0, 1), **above, **small)
    if asked:
        axes.axhline(sum(heights[: len(arms)]), color=style.GREY, lw=0.6, ls=(0, (2, 2)))
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_yticks(places, labels)
    axes.set_ylim(place, 0)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(visible=False, axis="y")
    baseline = report.rows[0]
    below = f"top-1 points; {'blue' if asked else 'arms'}: arm minus {baseline.arm} ({baseline.top1:.1f} %)"
    below += "; red: as named" if asked else ""
    below += f"\n{filling(e for _, e, _ in lines)}"
    style.describe(figure, caption(report), below)
    return figure


def _wrapped(name: str) -> str:
    """Wrap a name into lines of at most 33 characters, preferably between parentheses."""
    whole = re.sub(r"\([^()]{,30}\)", lambda match: match[0].replace(" ", "\u00a0"), name)
    return textwrap.fill(whole, 33)
