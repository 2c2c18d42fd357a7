"""Divergence of every method's maps from the pre-trained and from the fine-tuned teacher's, beside its accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atdiag.study.matching import PRE_TRAINED, TUNED, column
from figures import captions, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import ArmResult, Reading, Report

_MATCHINGS = {"same": "head by head", "optimal": "one to one", "best": "nearest", "averaged": "averaged"}
_SHADES = "viridis_r"
_ROW = 0.2
"""Height of a method's row, in inches."""


@style.drawn
def agreement(reading: Reading) -> Figure:
    """Draw a cell with the divergence for each method (row) and matching of heads (column); a panel for each reference.

    Right: accuracies. Several teachers stand one above another. Raises ValueError if no divergence was measured.
    """
    reports = reading.reports
    references = [one for one in (PRE_TRAINED, TUNED) if any(_measured(report, one) for report in reports)]
    found = [v for report in reports for one in references for row in report.rows for v in _values(row, one) if v]
    if not found:
        raise ValueError("no divergence of maps was measured")
    rows = [[row for row in report.rows if any(_values(row, one) for one in references)] for report in reports]
    heights = [_ROW * len(some) + 0.45 for some in rows]
    figure, panels = style.panels(
        len(reports), len(references), sum(heights), style.PAGE, gridspec_kw={"height_ratios": heights}
    )
    names = captions.studies(reports)
    for i, some in enumerate(rows):
        for j, reference in enumerate(references):
            axes = panels[i * len(references) + j]
            _cells(axes, some, reference, max(found))
            axes.set_yticks(range(len(some)), [row.arm for row in some] if j == 0 else [""] * len(some))
            where = f"{names[i]}, " if len(reports) > 1 else ""
            axes.set_title(style.wrapped(f"{where}from the {reference} teacher's maps", 40), loc="left")
            if j == len(references) - 1:
                _accuracies(axes, some)
    note = "Jensen-Shannon divergence in bits, mean over blocks, by how heads are matched; right: top-1 accuracy"
    style.finish(figure, captions.caption(reading, style.PAGE), [], note)
    return figure


def _cells(axes: Axes, rows: list[ArmResult], reference: str, top: float) -> None:
    """Draw the cells, darker for a larger divergence; one that was not measured is left empty."""
    import matplotlib as mpl

    shades = mpl.colormaps[_SHADES]
    told: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
    for y, row in enumerate(rows):
        for x, value in enumerate(_values(row, reference)):
            share = value / top if top else 0.0
            axes.add_patch(mpl.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, fc=shades(share), ec="white", lw=0.6))
            axes.text(x, y, f"{value:.3f}", color="white" if share > 0.5 else style.INK, **told)
    axes.set_xlim(-0.5, len(_MATCHINGS) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(_MATCHINGS)), list(_MATCHINGS.values()))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _accuracies(axes: Axes, rows: list[ArmResult]) -> None:
    told: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 6.5, "color": style.GREY}
    for y, row in enumerate(rows):
        axes.annotate(f"{row.top1:.1f} %", (1.02, y), **told)


def _measured(report: Report, reference: str) -> bool:
    return any(_values(row, reference) for row in report.rows)


def _values(row: ArmResult, reference: str) -> list[float]:
    """Return an arm's divergences, one for each matching; empty if they were not measured."""
    names = [column(reference, how) for how in _MATCHINGS]
    return [row.numbers[name] for name in names] if all(name in row.numbers for name in names) else []
