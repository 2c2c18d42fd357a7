"""Divergence of students' maps from their teacher's, and gain: does the matching fail, or the use of the maps?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures import captions, grids, marks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.study.protocol import ArmResult, Reading, Report

_MEAN, _BLOCK, _MATCHED = "JSD", re.compile(r"JSD block (\d+)"), "JSD heads matched"
"""Names of the measurements (in bits) in ``ablations/match.py``."""


@style.drawn
def match(reading: Reading) -> Figure:
    """Draw the divergence from the teacher's maps by block (left), and gain over mean divergence (right).

    A colour for each study, a marker for each arm; a stroke at zero is the baseline's divergence with heads matched one
    to one, since the heads of a student that never saw the teacher have no order. The left panel is drawn only if
    divergence was measured by block. Raises ValueError if no arm's divergence was measured.
    """
    reports = reading.reports
    if not any(_MEAN in row.numbers for report in reports for row in marks.contrasted(report)):
        raise ValueError("no arm's divergence from its teacher was measured")
    names = captions.studies(reports)
    hues = dict(zip(names, style.colours(len(names)), strict=True))
    arms = marks.arms(reports)
    by_block = any(_blocks(row) for report in reports for row in marks.contrasted(report))
    width = style.PAGE if by_block else style.COLUMN
    figure, panels = style.panels(1, 2 if by_block else 1, 2.1, width)
    if by_block:
        _left(panels[0], reports, list(hues.values()), arms)
    _right(panels[-1], reports, list(hues.values()), arms)
    # Colour identifies the study and marker the arm, so the legend lists them separately.
    keys = [marks.key((hue, "s"), name, ls="", ms=5) for name, hue in hues.items()]
    keys += [marks.key((style.INK, marker), name, ls=_form(name, arms)) for name, (_, marker) in arms.items()]
    if any(_MATCHED in report.rows[0].numbers for report in reports):
        label = f"{reports[0].rows[0].arm}, heads matched"
        keys.append(marks.key((style.INK, "|"), label, ls="", ms=6, mew=1.2))
    every = [row.contrast_or_raise() for report in reports for row in marks.contrasted(report)]
    note = f"{'right: ' if by_block else ''}{captions.filling(every)}"
    if same := _same(reports):
        note += f"; {', '.join(same)}: 0 bits" + (" from every teacher, drawn side by side" if len(reports) > 1 else "")
    style.finish(figure, captions.caption(reading, width), keys, note)
    return figure


def _same(reports: Sequence[Report]) -> list[str]:
    """Return the arms whose maps are the teacher's own in every study, so that their marks would hide each other."""
    rows = [{row.arm: row.numbers.get(_MEAN) for row in marks.contrasted(report)} for report in reports]
    return [arm for arm in rows[0] if all(row.get(arm) == 0 for row in rows)]


def _left(axes: Axes, reports: Sequence[Report], hues: list[str], arms: dict[str, marks.Look]) -> None:
    highest, last = 0.0, 0
    for report, hue in zip(reports, hues, strict=True):
        for row in marks.contrasted(report):
            blocks = _blocks(row)
            if not blocks:
                continue
            form, marker = _form(row.arm, arms), arms[row.arm][1]
            axes.plot(list(blocks), list(blocks.values()), ls=form, marker=marker, ms=2.8, lw=0.9, color=hue)
            highest, last = max(highest, *blocks.values()), max(last, *blocks)
    axes.set_ylim(-0.04 * highest, 1.08 * highest or 1.0)
    axes.set_xlabel("block")
    axes.set_ylabel("JSD from the teacher's maps, bits")
    axes.grid(visible=False, axis="x")
    grids.ticks(axes, range(last + 1), log=False)


def _right(axes: Axes, reports: Sequence[Report], hues: list[str], arms: dict[str, marks.Look]) -> None:
    found = [row.numbers[_MEAN] for r in reports for row in marks.contrasted(r) if _MEAN in row.numbers]
    step = 0.02 * (max(found) or 1.0)
    for i, (report, hue) in enumerate(zip(reports, hues, strict=True)):
        if (alone := report.rows[0].numbers.get(_MATCHED)) is not None:
            axes.plot(alone, 0, "|", color=hue, ms=6, mew=1.2, zorder=2)
        for row in marks.contrasted(report):
            if (mean := row.numbers.get(_MEAN)) is not None:
                beside = step * (i - (len(reports) - 1) / 2) if mean == 0 else 0.0
                marks.upright(axes, mean + beside, row.contrast_or_raise(), (hue, arms[row.arm][1]))
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("JSD from the teacher's maps, mean over layers, bits")
    axes.set_ylabel(f"top-1 points minus {reports[0].rows[0].arm}")


def _form(arm: str, arms: dict[str, marks.Look]) -> str:
    """Return the line style of an arm; the first arm's is solid."""
    return ("-", "--", ":", "-.")[list(arms).index(arm) % 4]


def _blocks(row: ArmResult) -> dict[int, float]:
    found = {int(m[1]): value for name, value in row.numbers.items() if (m := _BLOCK.fullmatch(name))}
    return dict(sorted(found.items()))
