"""Gain over whose maps are given, for each start of the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from figures import captions, marks, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Report


@style.drawn
def grid(report: Report) -> Figure:
    """Draw points above the baseline, a row for each teacher's maps, a colour and a marker for each start.

    Filled: clear of zero; open: not. Right: accuracies.
    """
    rows = {tuple(row.arm.rsplit(", ", 1)): row for row in marks.contrasted(report)}
    maps, starts = (list(dict.fromkeys(part)) for part in zip(*rows, strict=True))
    looks = marks.looks(starts)
    figure, axes = style.canvas(height=0.55 + 0.34 * len(maps))
    told: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6.5, "color": style.GREY}
    for y, name in enumerate(maps):
        for start in starts:
            if (name, start) not in rows:
                continue
            offset = (starts.index(start) - (len(starts) - 1) / 2) * 0.3
            row, place = rows[name, start], y + offset
            marks.across(axes, row.contrast_or_raise(), place, looks[start])
            axes.annotate(f"{row.top1:.1f} %", (1.02, place), **told)
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_yticks(range(len(maps)), [style.wrapped(name, 22) for name in maps])
    axes.set_ylim(len(maps) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(visible=False, axis="y")
    baseline = report.rows[0]
    axes.set_xlabel(f"top-1 points minus {baseline.arm} ({baseline.top1:.1f} %)")
    every = [row.contrast_or_raise() for row in rows.values()]
    keys = [marks.key(look, start) for start, look in looks.items()]
    style.finish(figure, captions.caption(report), keys, f"{captions.filling(every)}\nright: top-1 accuracy")
    return figure
