"""File names and the machine-readable form of a reading."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core import paths
from atdiag.core.text import count
from atdiag.reports import tables
from atdiag.study.protocol import Reading, Report, Series

if TYPE_CHECKING:
    from atdiag.stats.contrasts import Estimate


def slug(series: Series) -> str:
    """Return a file name for a series: its options, and a few digits of a hash over its runs' specs."""
    every = [tuple(study.options.values()) for study in series.studies]
    options = "-".join(every[0]) if len(set(every)) == 1 else ""
    words = re.sub(r"[^\w.-]+", "-", options.replace(" ", "")) or series.ablation
    on = sorted({study.test_set for study in series.studies if study.test_set})
    digest = hashlib.sha256(" ".join([*sorted(spec.id for spec in series.specs), *on]).encode()).hexdigest()[:6]
    return f"{words}-{digest}"


def folder(series: Series, profile: str, out: Path | None) -> Path:
    """Return the folder for a series' tables and figures. Raises UserError if it can't be created and written."""
    teachers = list(dict.fromkeys(study.teacher.name for study in series.studies))
    whom = plain(teachers[0]) if len(teachers) == 1 else f"{len(teachers)}-teachers"
    chosen = out or Path("results") / f"{series.ablation}-{whom}-{profile}"
    paths.writable(chosen, "out")
    return chosen


def plain(name: str) -> str:
    """Return a teacher's name for use in a file name: ``timm:MODEL@/path/file`` without the path."""
    return re.sub(r"[^\w.-]+", "-", name.partition("@")[0])


def as_json(reading: Reading) -> dict[str, Any]:
    """Return a reading as a JSON document."""
    first = reading.reports[0]
    return {
        "ablation": reading.series.ablation,
        "profile": first.profile,
        "overrides": dict(first.overrides),
        "studies": [_study(report) for report in reading.reports],
        "claims": [tables.claim_record(one) for one in reading.judged],
        "verdict": reading.verdict,
        "notes": tables.notes(reading),
    }


def caption(reading: Reading) -> str:
    """Return the figure's caption for a paper: its content, the numbers of images, seeds and runs, the profile."""
    return "\n".join([*headline(reading), *tables.notes(reading), f"Runs: {', '.join(reading.runs)}.", ""])


def headline(reading: Reading) -> list[str]:
    """Return a caption's sentences on what is shown, with the numbers of images and seeds."""
    report = reading.reports[0]
    estimates = [row.contrast for row in report.rows if row.contrast is not None]
    lines = [f"{tables.title(reading.series)}. Top-1 accuracy, and points against {report.rows[0].arm}."]
    if estimates:
        one = estimates[0]
        of = f" of {one.clusters:,} clusters" if one.clusters != one.images else ""
        seeds = count(report.rows[0].seeds, "seed")
        lines.append(f"n = {one.images:,} test images{of}, {seeds}; intervals: 95 %, over {one.covers}.")
    return lines


def _study(report: Report) -> dict[str, Any]:
    reference = report.reference
    return {
        "study": report.study.label,
        "teacher": report.study.teacher.label,
        "options": dict(report.study.options),
        "test_set": report.study.test_set,
        "arms": [
            {
                "arm": row.arm,
                "top1": row.top1,
                **_numbers(row.contrast, "contrast"),
                "seeds": row.seeds,
                **row.numbers,
                "classes_predicted": list(row.classes),
                "runs": list(row.runs),
            }
            for row in report.rows
        ],
        "reference": None
        if reference is None
        else {
            "top1": reference.top1,
            "runs": list(reference.runs),
            "head": None if (own := report.study.reference) is None or own.head is None else own.head.note,
            "head_warning": report.head_warning or None,
            "probe": own is not None and own.probed,
        },
        "contrasts": [
            {"contrast": name, **_numbers(e, "value"), "seeds": e.seeds} for name, e in report.contrasts.items()
        ],
        "chance": _footing(report),
        "verdict": report.verdict,
    }


def _footing(report: Report) -> dict[str, float | bool] | None:
    """Return chance, the lower limit of the baseline's accuracy and the required one, in per cent; None: not known."""
    if (stands := report.footing) is None:
        return None
    return {
        "top1": stands.chance,
        "baseline_low": stands.low,
        "needed": stands.needed,
        "undertrained": report.undertrained,
        "short_on_purpose": report.study.short_on_purpose,
    }


def _numbers(estimate: Estimate | None, name: str) -> dict[str, float | None]:
    if estimate is None:
        return dict.fromkeys((name, "ci_low", "ci_high", "p", "p_holm"))
    return {
        name: estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "p": estimate.p,
        "p_holm": estimate.adjusted,
    }
