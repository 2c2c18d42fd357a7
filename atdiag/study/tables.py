"""A report as a table: on the terminal, as CSV, Markdown and JSON."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.study.ablation import Report, Row, Study
from atdiag.words import UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


def title(report: Report) -> str:
    """``reinit - clip_b (mini) - module attn, transfer copy``."""
    options = ", ".join(f"{name} {value}" for name, value in report.study.options.items())
    return " - ".join(filter(None, (report.study.ablation, report.study.teacher.label, options)))


def slug(study: Study) -> str:
    """A file name for a study: its options, and a few digits that any change of a run's spec changes."""
    options = "-".join(study.options.values()).replace(" ", "") or study.ablation
    digest = hashlib.sha256(" ".join(sorted(spec.id for spec in study.specs)).encode()).hexdigest()[:6]
    return f"{options}-{digest}"


def _plain(name: str) -> str:
    """A teacher's name as part of a file name: ``timm:MODEL@/path/file`` without the path."""
    return re.sub(r"[^\w.-]+", "-", name.partition("@")[0])


def frame(report: Report) -> pd.DataFrame:
    """One line for each arm, the reference, and each further contrast: what a table or a figure shows, in full."""
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for row in [*report.rows, *([report.reference] if report.reference else [])]:
        kind = "reference" if row is report.reference else "arm"
        lines.append({"kind": kind, "name": row.arm, "top1": row.top1, **_numbers(row.contrast), "seeds": row.seeds})
        lines[-1]["runs"] = " ".join(row.runs)
    for name, estimate in report.contrasts.items():
        lines.append({"kind": "contrast", "name": name, "top1": None, **_numbers(estimate), "seeds": estimate.seeds})
        arms = next(c.weights for c in report.study.contrasts if c.name == name)
        lines[-1]["runs"] = " ".join(run for arm in arms for run in report.row(arm).runs)
    table = pd.DataFrame(lines)
    table.insert(0, "teacher", report.study.teacher.label)
    table["overrides"] = " ".join(f"{name}={value}" for name, value in sorted(report.overrides.items()))
    table.insert(0, "profile", report.profile)
    table.insert(0, "ablation", report.study.ablation)
    return table


def _numbers(estimate: Any) -> dict[str, Any]:
    if estimate is None:
        return {"contrast": None, "ci_low": None, "ci_high": None, "interval_covers": None}
    return {
        "contrast": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "interval_covers": estimate.covers,
    }


def _interval(estimate: Any) -> str:
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.arm, f"{row.top1:.1f}", "" if row.contrast is None else _interval(row.contrast), str(row.seeds)


def terminal(report: Report) -> Table:
    """The table that a terminal shows."""
    from rich import box
    from rich.table import Table

    table = Table(title=title(report), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("arm", overflow="fold", min_width=12)
    table.add_column("top-1 %", justify="right", no_wrap=True)
    table.add_column("points vs scratch [95 %]", justify="right", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(row))
    if report.reference:
        table.add_section()
        name = f"{report.study.teacher.label} itself"
        table.add_row(name, f"{report.reference.top1:.1f}", "its own head", "", style="dim")
    if report.contrasts:
        table.add_section()
        for name, estimate in report.contrasts.items():
            table.add_row(name, "", _interval(estimate), str(estimate.seeds))
    return table


def markdown(report: Report) -> str:
    """The same table in Markdown, with the verdict, the notes and the runs it stands on."""
    lines = [
        f"### {title(report)}",
        "",
        "| arm | top-1 % | points vs scratch [95 %] | seeds |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(_cells(row))} |" for row in report.rows),
    ]
    if report.reference:
        lines.append(f"| *{report.study.teacher.label} itself* | {report.reference.top1:.1f} | *its own head* | |")
    lines += [f"| {name} | | {_interval(e)} | {e.seeds} |" for name, e in report.contrasts.items()]
    lines += ["", report.verdict, ""]
    lines += [f"- {note}" for note in notes(report)]
    lines += ["", "Runs:", *(f"- {row.arm}: {', '.join(row.runs)}" for row in _all_rows(report)), ""]
    return "\n".join(lines)


def notes(report: Report) -> list[str]:
    """What a reader must know beside the numbers."""
    out = list(report.study.notes)
    out += [
        f"The teacher's weights without a place in the student, dropped: {', '.join(names)}."
        for names in dict.fromkeys(report.dropped.values())
    ]
    data = report.study.arms[0].specs[0].data
    grouped = " (by source digit)" if data.image_size is None else ""
    out.append(
        f"Profile {report.profile}, data {data.name}. Intervals: 95 %, over "
        + (f"seeds and test images{grouped}." if report.rows[0].seeds > 1 else "test images only: one seed.")
    )
    if report.overrides:
        out.append(
            "Overrides: " + ", ".join(f"{name}={value}" for name, value in sorted(report.overrides.items())) + "."
        )
    if (
        report.reference is None
        and report.study.teacher.network.classes != report.study.arms[0].specs[0].network.classes
    ):
        out.append(f"The teacher's own accuracy is not shown: its head is for another task than {data.name}.")
    return out


def _all_rows(report: Report) -> list[Row]:
    return [*report.rows, *([report.reference] if report.reference else [])]


def as_json(report: Report, files: list[Path]) -> dict[str, Any]:
    """The machine-readable line of an experiment."""
    return {
        "ablation": report.study.ablation,
        "profile": report.profile,
        "teacher": report.study.teacher.label,
        "options": dict(report.study.options),
        "overrides": dict(report.overrides),
        "arms": [
            {
                "arm": row.arm,
                "top1": row.top1,
                "contrast": None if row.contrast is None else row.contrast.value,
                "ci_low": None if row.contrast is None else row.contrast.low,
                "ci_high": None if row.contrast is None else row.contrast.high,
                "seeds": row.seeds,
                "runs": list(row.runs),
            }
            for row in report.rows
        ],
        "reference": None
        if report.reference is None
        else {"top1": report.reference.top1, "runs": list(report.reference.runs)},
        "contrasts": [
            {"contrast": name, "value": e.value, "ci_low": e.low, "ci_high": e.high, "p": e.p, "seeds": e.seeds}
            for name, e in report.contrasts.items()
        ],
        "verdict": report.verdict,
        "files": [str(path) for path in files],
    }


def output_folder(study: Study, profile: str, out: Path | None) -> Path:
    """The folder for a study's tables and figures, made and writable. Raises UserError where it can't be."""
    folder = out or Path("results") / f"{study.ablation}-{_plain(study.teacher.name)}-{profile}"
    writable(folder, "--out")
    return folder


def writable(folder: Path, option: str) -> None:
    """Make sure that a folder can be made and written, without making it. Raises UserError otherwise."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"{option} {folder}: {existing} is not a folder", f"choose another with {option}")
        with tempfile.TemporaryFile(dir=existing):  # asking the system is no use: root may write anywhere, it says
            pass
    except OSError as fault:
        raise UserError(
            f"{option} {folder} can't be written ({fault.strerror})", f"choose another folder with {option}"
        ) from None
