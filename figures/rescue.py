"""Before and after: gain from transfer in the standard student, and in one with the native components."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, marks, rows, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import Reading, Report

# Names of arms and contrasts in ``ablations/rescue.py``; the contrast of interest is the first.
_PLAIN, _CONTROL, _PASSED = "standard + ", "native, scratch", "transfer in the native student"

_LOOKS = {
    "transfer, standard student": (style.VERMILLION, "o"),
    "transfer, native student": (style.BLUE, "s"),
    "native components alone": (style.GREEN, "^"),
}


@style.drawn
def rescue(reading: Reading) -> Figure:
    """Draw a row for each teacher: the gain of transfer in the standard student, joined to that in the native one.

    Below: the effect of the native components without transfer. Right: the difference of the two gains, bold if clear
    of zero.
    """
    figure, axes, places = rows.canvas(reading.reports, lambda report: 3)
    for place in places:
        estimates = _three(place.report)
        heights = rows.spread(place, 3)
        joined = [estimate.value for estimate in estimates[:2]]
        axes.plot(joined, heights[:2], color=style.GREY, lw=0.8, zorder=2)
        for estimate, look, y in zip(estimates, _LOOKS.values(), heights, strict=True):
            marks.across(axes, estimate, y, look)
    differences = [next(iter(place.report.contrasts.values())) for place in places]
    taken = rows.column(axes, "scratch", places, [f"{place.report.rows[0].top1:.1f}" for place in places])
    bold = [estimate.clear for estimate in differences]
    rows.column(axes, "rescue", places, [f"{estimate.value:+.1f}" for estimate in differences], taken, bold)
    axes.set_xlabel("top-1 points")
    keys = [marks.key(look, name) for name, look in _LOOKS.items()]
    filling = captions.filling(estimate for report in reading.reports for estimate in _three(report))
    note = f"{filling}\nright: top-1 of scratch, %; rescue: native minus standard, points\n(bold: clear of zero)"
    style.finish(figure, captions.caption(reading), keys, note)
    return figure


def _three(report: Report) -> list[Estimate]:
    plain = next(row for row in report.rows if row.arm.startswith(_PLAIN))
    return [plain.contrast_or_raise(), report.contrasts[_PASSED], report.row(_CONTROL).contrast_or_raise()]
