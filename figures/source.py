"""What a student gains from each architecture's two teachers, pre-trained in two ways, at each training budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import captions, marks, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import ArmResult, Reading


@style.drawn
def source(reading: Reading) -> Figure:
    """Draw a row of panels for each method and a column for each budget: gains over architectures.

    A colour and a marker for each kind of pre-training.
    """
    reports = reading.reports
    options = reports[0].study.options
    methods, kinds = options["methods"].split(","), options["kinds"].split(",")
    found = {_parts(row): row for row in reports[0].rows[1:]}
    pairs = list(dict.fromkeys(pair for pair, _, _ in found))
    width = style.COLUMN if len(reports) == 1 else style.PAGE
    figure, panels = style.panels(len(methods), len(reports), 1.6 * len(methods) + 0.6, width, sharex=True, sharey=True)
    looks = marks.looks(kinds)
    for place, axes in enumerate(panels):
        method, report = methods[place // len(reports)], reports[place % len(reports)]
        rows = {_parts(row): row for row in report.rows[1:]}
        axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
        for kind, look in looks.items():
            for x, pair in enumerate(pairs):
                estimate = rows[pair, kind, method].contrast_or_raise()
                marks.upright(axes, x + 0.2 * (kinds.index(kind) - 0.5), estimate, look)
        axes.set_xticks(range(len(pairs)), [_short(pair, reading) for pair in pairs])
        axes.set_xlim(-0.5, len(pairs) - 0.5)
        axes.grid(visible=False, axis="x")
        if place < len(reports):
            axes.set_title(f"{report.study.label} (scratch {report.rows[0].top1:.1f} %)", loc="left", pad=3)
    for method, axes in zip(methods, panels[:: len(reports)], strict=True):
        axes.set_ylabel(f"{method}, points")
    probes = [f"{_short(pair, reading)} {_levels(pair, kinds, found)}" for pair in pairs]
    every = [row.contrast_or_raise() for report in reports for row in report.rows[1:] if "probe" not in _parts(row)]
    note = f"points: top-1 minus {reports[0].rows[0].arm}; {captions.filling(every)}\nprobes, %: {'; '.join(probes)}"
    style.finish(figure, captions.caption(reading, width), [marks.key(look, n) for n, look in looks.items()], note)
    return figure


def _parts(row: ArmResult) -> tuple[str, str, str]:
    """Return the architecture, the kind of pre-training and the method of an arm (``probe``: the teacher itself)."""
    teacher, method = row.arm.rsplit(": ", 1)
    pair, kind = teacher.rsplit(", ", 1)
    return pair, kind, method


def _short(pair: str, reading: Reading) -> str:
    return pair.removesuffix(f" ({reading.reports[0].profile})")


def _levels(pair: str, kinds: list[str], found: dict[tuple[str, str, str], ArmResult]) -> str:
    return " and ".join(f"{found[pair, kind, 'probe'].top1:.1f}" for kind in kinds)
