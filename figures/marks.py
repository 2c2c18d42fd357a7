"""Points with intervals, as in every figure of contrasts: filled if the sign is settled, else open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import ArmResult, Report

Look = tuple[str, str]
"""Colour and marker."""

_FIXED = ("copy", "distill", "finetune", "logits", "features")
"""Arms with the same look in all figures, whatever the other arms of a study."""


def arms(reports: Iterable[Report]) -> dict[str, Look]:
    """Return the look of every arm that is contrasted with a baseline, in the order in which studies name them."""
    names = list(dict.fromkeys(row.arm for report in reports for row in contrasted(report)))
    fixed = {name: i for i, name in enumerate(_FIXED) if name in names}
    free = [i for i in range(len(names) + len(_FIXED)) if i not in fixed.values()]
    places = {name: fixed[name] if name in fixed else free.pop(0) for name in names}
    return looks(places, max(places.values(), default=0) + 1)


def looks(places: Mapping[str, int] | Sequence[str], count: int | None = None) -> dict[str, Look]:
    """Return a colour and a marker for each name."""
    placed = places if isinstance(places, Mapping) else {name: i for i, name in enumerate(places)}
    most = len(placed) if count is None else count
    hues, shapes = style.colours(most), style.markers(most)
    return {name: (hues[i], shapes[i]) for name, i in placed.items()}


def contrasted(report: Report) -> list[ArmResult]:
    """Return the arms that have a contrast with the baseline."""
    return [row for row in report.rows if row.contrast is not None]


def point(axes: Axes, x: float, y: float, colour: str, marker: str, clear: bool, size: float = 4.0) -> None:
    """Draw a marker, filled if its contrast is clear of zero."""
    axes.plot(x, y, marker, ms=size, mfc=colour if clear else "white", mec=colour, mew=1.0, zorder=4)


def across(axes: Axes, estimate: Estimate, y: float, look: Look, size: float = 4.0) -> None:
    """Draw a contrast along the horizontal axis."""
    axes.plot([estimate.low, estimate.high], [y, y], color=look[0], solid_capstyle="butt", zorder=3)
    point(axes, estimate.value, y, *look, clear=estimate.clear, size=size)


def upright(axes: Axes, x: float, estimate: Estimate, look: Look) -> None:
    """Draw a contrast along the vertical axis."""
    axes.plot([x, x], [estimate.low, estimate.high], color=look[0], lw=0.9, solid_capstyle="butt")
    point(axes, x, estimate.value, *look, clear=estimate.clear, size=3.5)


def key(look: Look, label: str, **options: Any) -> Line2D:
    """Return a legend entry."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": look[0], "marker": look[1], "ms": 4.0, "lw": 1.2, "label": label, **options})
