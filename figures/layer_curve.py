"""Accuracy against the number of blocks whose attention is transferred."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import style
from figures.contrasts import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.ablation import Report


def layer_curve(report: Report) -> Figure:
    """Top-1 over k, the band being the interval of the contrast with the baseline (k = 0) laid around the curve."""
    figure, axes = style.canvas(height=2.2)
    baseline = report.rows[0].top1
    points = sorted((report.study.curve[row.arm], row) for row in report.rows)
    ks = [k for k, _ in points]
    low = [baseline + (row.contrast.low if row.contrast else 0) for _, row in points]
    high = [baseline + (row.contrast.high if row.contrast else 0) for _, row in points]
    axes.fill_between(ks, low, high, color=style.BLUE, alpha=0.2, lw=0)
    axes.plot(ks, [row.top1 for _, row in points], "o-", color=style.BLUE, ms=3.5, zorder=3)
    axes.axhline(baseline, color=style.INK, lw=0.8, ls=(0, (4, 2)))
    levels = {report.rows[0].arm: baseline}
    if report.reference is not None:
        axes.axhline(report.reference.top1, color=style.GREY, lw=0.8, ls=(0, (1, 1.5)))
        levels["teacher"] = report.reference.top1
    _name_levels(axes, levels)
    axes.set_xticks(ks[:: -(-len(ks) // 16)])
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("top-1 accuracy, %")
    options = report.study.options
    below = f"k: blocks from the {options['from']} whose attention is transferred ({options['transfer']})"
    style.describe(figure, caption(report), below)
    return figure


def _name_levels(axes: Axes, levels: dict[str, float]) -> None:
    """Name horizontal lines at their right end; names that would touch are moved apart."""
    bottom, top = axes.get_ylim()
    points = 110 / (top - bottom)  # the axes are about 110 points high
    place = -10.0
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        place = max(points * (level - bottom), place + 8)
        axes.annotate(
            name,
            (1.01, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, place - points * (level - bottom)),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            color=style.GREY if name == "teacher" else style.INK,
        )
