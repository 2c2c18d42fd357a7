"""Titles for figures of finished studies: experiment, teachers, scale, number of seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from atdiag.study.protocol import Reading, Report
from figures import style

if TYPE_CHECKING:
    from atdiag.stats.contrasts import Estimate

_CHARACTERS = 62 / style.COLUMN
"""Characters of a title per inch of a figure's width."""


def caption(shown: Report | Reading, width: float = style.COLUMN) -> str:
    """Return a title: experiment, teacher (or their number), scale, seeds, and the options common to all studies.

    width: width of the figure in inches, to which lines are wrapped.
    """
    reports = shown.reports if isinstance(shown, Reading) else (shown,)
    first, seeds = reports[0], reports[0].rows[0].seeds
    covers = f"{seeds} seeds, 95 % intervals" if seeds > 1 else "1 seed, 95 % intervals (images only)"
    own = [f"{name} {value}" for name, value in shared_options(reports).items()]
    own += [f"{name}={value}" for name, value in sorted(first.overrides.items())]
    most = round(_CHARACTERS * width)
    head = [first.study.ablation, _subject(reports), *covers.split(", ")]
    return "\n".join(line for parts in (head, own, _undertrained(reports)) for line in _lines(parts, most))


def _undertrained(reports: Sequence[Report]) -> list[str]:
    """Say once which studies are too near chance for a verdict."""
    short = [name for name, one in zip(studies(reports), reports, strict=True) if one.undertrained]
    if not short:
        return []
    first, *others = short if len(short) < len(reports) or len(reports) == 1 else [f"all {len(reports)}"]
    return [f"undertrained, nothing can be said: {first}", *others]


def _lines(parts: Sequence[str], most: int) -> list[str]:
    """Join parts with commas into lines of at most this many characters, keeping parts whole where possible."""
    whole = ", ".join(part.replace(" ", "\u00a0") for part in parts)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(whole, most)]


def shared_options(reports: Sequence[Report]) -> dict[str, str]:
    """Return the options with the same value in all studies."""
    first, *others = (report.study.options for report in reports)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _subject(reports: Sequence[Report]) -> str:
    labels = list(dict.fromkeys(report.study.subject for report in reports))
    profile = reports[0].profile
    whom = labels[0] if len(labels) == 1 else f"{len(labels)} teachers{_scale(reports)}"
    return whom if profile == "paper" or whom.endswith(f"({profile})") else f"{whom}, profile {profile}"


def _scale(reports: Sequence[Report]) -> str:
    """Return `` (mini)`` if all teachers' labels end in it: the title then says it once for all."""
    end = f" ({reports[0].profile})"
    return end if all(report.study.teacher.label.endswith(end) for report in reports) else ""


def teachers(reports: Sequence[Report]) -> list[str]:
    """Return each study's teacher, without what the title already says."""
    scale = _scale(reports)
    return [report.study.teacher.label.removesuffix(scale) for report in reports]


def studies(reports: Sequence[Report]) -> list[str]:
    """Return each study's label, without what the title already says."""
    scale = _scale(reports)
    labels = [report.study.label.replace(scale, "") if scale else report.study.label for report in reports]
    whom = f"{teachers(reports)[0]}, "
    if len(set(teachers(reports))) == 1 and len(reports) > 1 and all(label.startswith(whom) for label in labels):
        return [label.removeprefix(whom) for label in labels]
    return labels


def levels(reports: Sequence[Report]) -> str:
    """Name the accuracies behind the contrasts of one teacher's studies: the baseline's, and the teacher's if known.

    ``scratch: 41.2 %``, ``scratch: 41.2 to 60.3 %; teacher: 80.1 %``.
    """
    own = {report.reference.top1 for report in reports if report.reference is not None}
    said = [f"{reports[0].rows[0].arm}: {_span([report.rows[0].top1 for report in reports])}"]
    return "\n".join(said + ([f"teacher: {_span(own)}"] if own else []))


def _span(values: Iterable[float]) -> str:
    low, high = (f"{end(values):.1f}" for end in (min, max))
    return f"{low} %" if low == high else f"{low} to {high} %"


def filling(estimates: Iterable[Estimate]) -> str:
    """Explain filled and open markers, for a legend or a line below."""
    corrected = " after Holm's correction" if any(e.adjusted is not None for e in estimates) else ""
    return f"filled: clear of zero{corrected}; open: not"
