"""A reading as a table: on the terminal, as a data frame, in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from atdiag.data import sources
from atdiag.reports.latex import booktabs
from atdiag.study import chance
from atdiag.study.claims import Judged
from atdiag.study.protocol import ArmResult, Reading, Report, Series

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from atdiag.stats.contrasts import Estimate


def title(series: Series) -> str:
    """Return a title such as ``reinit - clip_b (mini) - module attn, transfer copy``; several teachers are counted."""
    first = series.studies[0]
    shared = {
        name: value
        for name, value in first.options.items()
        if all(study.options.get(name) == value for study in series.studies)
    }
    options = ", ".join(f"{name} {value}" for name, value in shared.items())
    return " - ".join(filter(None, (series.ablation, subject(series), options)))


def subject(series: Series) -> str:
    """Return who teaches in a series: one teacher, those that a study compares, or their number."""
    labels = list(dict.fromkeys(study.subject for study in series.studies))
    return labels[0] if len(labels) == 1 else f"{len(labels)} teachers"


def frame(reading: Reading) -> pd.DataFrame:
    """Tabulate each arm, reference and further contrast of each study, one row each, in full.

    Columns: ablation, profile, study (its label), teacher, test_set, kind (arm, reference, contrast), name, top1 (%),
    contrast (points), ci_low and ci_high (95 %), interval_covers, p, p_holm (corrected for all contrasts here), seeds,
    further measurements, runs (ids, separated by spaces), overrides.
    """
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for report in reading.reports:
        study = report.study
        data = study.test_set or study.arms[0].specs[0].data.name
        common = {"study": study.label, "teacher": study.teacher.label, "test_set": data}
        for row in rows(report):
            kind = "reference" if row is report.reference else "arm"
            measured = {"top1": row.top1, **_numbers(row.contrast), "seeds": row.seeds, **row.numbers}
            lines.append(common | {"kind": kind, "name": row.arm} | measured | {"runs": " ".join(row.runs)})
        for name, estimate in report.contrasts.items():
            arms = next(c.weights for c in study.contrasts if c.name == name)
            runs = " ".join(run for arm in arms for run in report.row(arm).runs)
            measured = {"top1": None, **_numbers(estimate), "seeds": estimate.seeds}
            lines.append(common | {"kind": "contrast", "name": name} | measured | {"runs": runs})
    table = pd.DataFrame(lines)
    table["runs"] = table.pop("runs")  # the longest column goes last, after the measurements
    first = reading.reports[0]
    table["overrides"] = " ".join(f"{name}={value}" for name, value in sorted(first.overrides.items()))
    table.insert(0, "profile", first.profile)
    table.insert(0, "ablation", reading.series.ablation)
    return table


def _numbers(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return dict.fromkeys(("contrast", "ci_low", "ci_high", "interval_covers", "p", "p_holm"))
    return {
        "contrast": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "interval_covers": estimate.covers,
        "p": estimate.p,
        "p_holm": estimate.adjusted,
    }


def rows(report: Report) -> list[ArmResult]:
    """Return the arms, and the teacher itself."""
    return [*report.rows, *([report.reference] if report.reference else [])]


def interval(estimate: Estimate) -> str:
    """Format an interval: ``+3.1 [+1.2, +5.0]``."""
    form = f"+.{estimate.digits}f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def probability(estimate: Estimate) -> str:
    """Return the corrected p-value; empty below three seeds, a word where no verdict can be given."""
    if estimate.undertrained:
        return "undertrained"
    p = estimate.adjusted
    return "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _measured(value: float) -> str:
    """Format a measurement: three digits, or a large count in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.3g}"


def _cells(name: str, row: ArmResult | None, estimate: Estimate | None, extra: Sequence[str]) -> list[str]:
    """Return a row's cells: name, top-1, contrast, p, further measurements, seeds."""
    seeds = row.seeds if row else estimate.seeds if estimate else 0
    measured = [_measured(row.numbers[column]) if row and column in row.numbers else "" for column in extra]
    versus = ["", ""] if estimate is None else [interval(estimate), probability(estimate)]
    return [name, "" if row is None else f"{row.top1:.1f}", *versus, *measured, str(seeds)]


def _extra(reading: Reading) -> list[str]:
    """Return the further measurements' columns, without details of another ("JSD block 0" beside "JSD")."""
    every = dict.fromkeys(name for report in reading.reports for row in report.rows for name in row.numbers)
    return [name for name in every if not any(name.startswith(f"{other} ") for other in every)]


def _head(reading: Reading) -> list[str]:
    baselines = {report.rows[0].arm for report in reading.reports}
    return ["arm", "top-1 %", f"points vs {baselines.pop()} [95 %]", "p, Holm", *_extra(reading), "seeds"]


def _lines(reading: Reading, report: Report) -> list[list[str]]:
    extra = _extra(reading)
    lines = [_cells(row.arm, row, row.contrast, extra) for row in report.rows]
    if report.reference:
        cells = _cells(f"{report.study.teacher.label} itself", report.reference, None, extra)
        probed = report.study.reference is not None and report.study.reference.probed
        told = "linear probe" if probed else "no better than chance" if report.head_warning else "its own head"
        lines.append([*cells[:2], told, *cells[3:-1], ""])
    return lines + [_cells(name, None, estimate, extra) for name, estimate in report.contrasts.items()]


def terminal(reading: Reading) -> Table:
    """Return the table for the terminal: a section for each study."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title(reading.series), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    for i, name in enumerate(_head(reading)):
        if i == 0:
            table.add_column(name, overflow="fold", min_width=12)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    several = len(reading.reports) > 1
    for report in reading.reports:
        if several:
            table.add_row(Text(report.study.label, style="bold"))
        count = len(report.rows)
        for i, cells in enumerate(_lines(reading, report)):
            itself = report.reference is not None and i == count
            indented = [f"  {cells[0]}" if several else cells[0], *cells[1:]]
            if not several and i == count:
                table.add_section()
            table.add_row(*indented, style="dim" if itself else None)
            if not several and itself:
                table.add_section()
        table.add_section()
    return table


def markdown(reading: Reading) -> str:
    """Format the same table as Markdown, with claims, verdict, notes, and the runs it is based on."""
    head = _head(reading)
    lines = [f"### {title(reading.series)}", "", _bar(head), _bar(["---", *["---:"] * (len(head) - 1)])]
    for report in reading.reports:
        if len(reading.reports) > 1:
            lines.append(_bar([f"**{report.study.label}**", *[""] * (len(head) - 1)]))
        lines += [_bar(cells) for cells in _lines(reading, report)]
    if reading.judged:
        lines += ["", *claims_markdown(reading.judged)]
    lines += ["", reading.verdict, "", *(f"- {note}" for note in notes(reading)), "", "Runs:"]
    for report in reading.reports:
        where = f"{report.study.label}, " if len(reading.reports) > 1 else ""
        lines += [f"- {where}{row.arm}: {', '.join(row.runs)}" for row in rows(report)]
    return "\n".join([*lines, ""])


def _bar(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(reading: Reading, caption: Sequence[str], label: str) -> str:
    """Return the same table for a paper. caption: the sentences above it; label: what ``\\ref`` refers to."""
    head = _head(reading)
    body: list[list[str]] = []
    for report in reading.reports:
        if len(reading.reports) > 1:
            body.append([report.study.label, *[""] * (len(head) - 1)])
        body += _lines(reading, report)
    return booktabs(head, body, " ".join(caption), label)


CLAIMS = ("claim", "paper", "ours [95 %]", "verdict")
CLAIM_COLUMNS = "".join(rf"p{{{share}\linewidth}}" for share in (0.25, 0.15, 0.25, 0.2))
"""Column alignment of the claims in LaTeX: sentences, which are wrapped."""


def claim_cells(judged: Judged) -> tuple[str, str, str, str]:
    """Return a claim's cells: claim, the paper's number, ours with the span of its intervals, and the verdict."""
    span = "" if judged.low is None else f" [{judged.low:+.1f}, {judged.high:+.1f}]"
    verdict = judged.verdict + (f" ({judged.note})" if judged.note else "")
    return judged.claim.name, judged.claim.paper, f"{judged.ours}{span}", verdict


def claims_markdown(judged: Sequence[Judged]) -> list[str]:
    """Format the claims as lines of a Markdown table."""
    return [_bar(CLAIMS), _bar(["---"] * len(CLAIMS)), *(_bar(claim_cells(one)) for one in judged)]


def claim_record(judged: Judged) -> dict[str, Any]:
    """Return a judged claim as a record: name, text, paper, source, verdict, ours, ci_low, ci_high, seeds, note."""
    return {
        **judged.claim.model_dump(include={"name", "text", "paper", "source"}),
        "verdict": judged.verdict,
        "ours": judged.ours,
        "ci_low": judged.low,
        "ci_high": judged.high,
        "seeds": judged.seeds,
        "note": judged.note,
    }


def claims_table(judged: Sequence[Judged], name: str = "the papers' claims, here") -> Table:
    """Return a table of the claims for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    for column in CLAIMS:
        table.add_column(column, overflow="fold", ratio=1)
    for one in judged:
        table.add_row(*claim_cells(one))
    return table


def notes(reading: Reading) -> list[str]:
    """Return the notes that a reader needs beside the numbers."""
    reports, first = reading.reports, reading.reports[0]
    out = [*reading.series.notes, *(note for report in reports for note in report.study.notes)]
    out += [note for report in reports for note in chance.notes(report)]
    out += [
        f"The teacher's weights without a place in the student, dropped: {', '.join(names)}."
        for report in reports
        for names in report.dropped.values()
    ]
    data = {study.arms[0].specs[0].data.name: study.arms[0].specs[0].data for study in reading.series.studies}
    shared = dict.fromkeys(filter(None, (sources.find(name).cluster for name in data)))
    grouped = f" (by {' or '.join(shared)})" if shared else ""
    out.append(
        f"Profile {first.profile}, data {', '.join(data)}. Intervals: 95 %, over "
        + (f"seeds and test images{grouped}" if first.rows[0].seeds > 1 else "test images only: one seed")
        + _corrected(reading)
    )
    seeds = [spec.seed.data for spec in first.study.arms[0].specs]
    if seeds[0]:
        out.append(f"Seeds from {seeds[0]} on.")
    if first.overrides:
        given = ", ".join(f"{name}={value}" for name, value in sorted(first.overrides.items()))
        out.append(f"Overrides: {given}.")
    out += filter(None, map(_own_head, reports))
    return list(dict.fromkeys([*out, *_power(reading)]))


def _own_head(report: Report) -> str:
    """Return how the teacher itself was measured: rows of its head, or a linear probe; or why it is not shown."""
    study = report.study
    if study.reference is not None:
        head = study.reference.head
        if head is None:
            return ""
        if study.reference.probed:
            images = study.reference.specs[0].probe_images
            why = "weights have no head" if study.teacher.network.classes == 1 else f"head is not used ({head.note})"
            return f"{study.teacher.label} itself: a linear probe on {images:,} training images, since its {why}."
        warning = f" It is {report.head_warning}." if report.head_warning else ""
        return f"{study.teacher.label} itself: which row of its head is which class: {head.note}.{warning}"
    if not study.teacher.network.differences:
        return ""  # the experiment does not measure it
    return (
        f"{study.teacher.label}'s own accuracy is not shown: it has {', '.join(study.teacher.network.differences)}, "
        "which no network of ours has; 'atdiag probe' measures what a linear classifier reads from its features."
    )


def _corrected(reading: Reading) -> str:
    count = len({r.made_of(name) for r in reading.reports for name, e in r.estimates if e.adjusted is not None})
    return f"; p is corrected for {count} contrasts (Holm)." if count > 1 else "."


def _power(reading: Reading) -> list[str]:
    """Return how many seeds would settle the undecided contrasts if the effects are as estimated."""
    from atdiag.stats.contrasts import FEWEST_SEEDS

    least = min(e.seeds for report in reading.reports for _, e in report.estimates)
    few = f"Verdicts begin at three seeds, and here {'is one' if least == 1 else 'are two'}: `seeds`=3 trains the rest."
    begin = [few] if least < FEWEST_SEEDS else []
    said = [
        f"{name}: {'more than 1,000' if seeds is None else f'about {seeds}'}" for name, _, seeds in unsettled(reading)
    ]
    if not said:
        return begin
    return [
        *begin,
        f"Seeds that would settle undecided contrasts (80 % power, effects as estimated): {'; '.join(said)}.",
    ]


def unsettled(reading: Reading) -> list[tuple[str, Estimate, int | None]]:
    """Return the undecided contrasts with the number of seeds that would settle each (None: more than 1,000).

    With 80 % power, if the effects are as estimated. Contrasts of one seed, and of undertrained studies, are left out.
    """
    from atdiag.stats.contrasts import seeds_needed

    several = len(reading.reports) > 1
    open_ = [
        (f"{report.study.label} {name}" if several else name, estimate)
        for report in reading.reports
        for name, estimate in report.estimates
        if estimate.seeds > 1 and not (estimate.clear or estimate.undertrained) and estimate.within is None
    ]
    # Settled contrasts no longer count among Holm's hypotheses.
    strict = [replace(estimate, level=1 - (1 - estimate.level) / len(open_)) for _, estimate in open_]
    return [(name, estimate, seeds_needed(one)) for (name, estimate), one in zip(open_, strict, strict=True)]
