"""Readings and claims as tables."""

import io
import json
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from ablations.benchmark import benchmark
from atdiag.cli.experiments import spread
from atdiag.core.runs import Store
from atdiag.reports import console, document, tables
from atdiag.study.aggregate import read
from atdiag.study.claims import Judged
from atdiag.study.protocol import BASELINE, Reading
from tests.studies import FAILS, finished, lab


@pytest.fixture
def reading(tmp_path) -> Reading:
    store = Store(tmp_path)
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy,distill"), lab())
    for study in series.studies:
        finished(study, store, {BASELINE: [20, 22], "copy": [30, 31], "distill": [25, 19], "teacher": [36]})
    return read(series, lab().settings, store)


def test_tables_fit_a_terminal_and_name_every_study(reading):
    terminal = Console(width=80, record=True, file=io.StringIO())
    terminal.print(tables.terminal(reading))
    text = terminal.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for report in reading.reports:
        assert report.study.label in text
        assert f"{report.study.label} itself" in text
    assert text.count("copy") >= 2
    assert "…" not in text


def test_brackets_in_names_verdicts_and_notes_are_printed_as_they_are(reading, capsys):
    first, *others = reading.reports
    named = replace(first, study=replace(first.study, label="my[bold]vit [a]", notes=("from [b] of [dim]x",)))
    shown = replace(reading, reports=(named, *others), verdict="zero at 5 [fewer than all tried, 638]")
    console.show_reading(shown, [])
    out = " ".join(capsys.readouterr().out.split())
    assert "Verdict zero at 5 [fewer than all tried, 638]" in out
    assert "my[bold]vit [a] scratch" in out
    assert "- from [b] of [dim]x" in out


def test_every_run_is_listed_behind_the_tables(reading):
    markdown, frame = tables.markdown(reading), tables.frame(reading)
    assert all(spec.id in markdown for spec in reading.series.specs)
    assert {run for runs in frame.runs for run in runs.split()} == {spec.id for spec in reading.series.specs}
    assert set(reading.runs) == {spec.id for spec in reading.series.specs}
    assert list(frame.study.unique()) == [report.study.label for report in reading.reports]
    found = json.loads(json.dumps(document.as_json(reading), allow_nan=False))
    assert [study["study"] for study in found["studies"]] == list(frame.study.unique())
    for study, report in zip(found["studies"], reading.reports, strict=True):
        assert [arm["top1"] for arm in study["arms"]] == [row.top1 for row in report.rows]
    caption = document.caption(reading)
    assert "2 seeds" in caption and "Profile mini" in caption and "n = 40 test images" in caption
    assert all(run in caption for run in reading.runs)


def test_latex_has_booktabs_rules_and_no_bare_special_characters(reading):
    text = tables.latex(reading, ["One seed is a run."], "tab:benchmark")
    assert text.count("\\toprule") == text.count("\\midrule") == text.count("\\bottomrule") == 1
    assert "deit\\_s (mini)" in text
    body = text.partition("\\midrule")[2].partition("\\bottomrule")[0]
    assert {line.count(" & ") for line in body.splitlines() if "&" in line} == {5 - 1}
    assert not [line for line in body.splitlines() if "%" in line.replace("\\%", "")]


def test_undecided_contrasts_say_how_many_seeds_would_settle_them(reading):
    (said,) = [note for note in tables.notes(reading) if "would settle" in note]
    assert "deit_s (mini) distill: " in said


def test_claims_as_a_table():
    judged = [Judged(FAILS, "holds", "-3.0", -4.0, -2.0, 3), Judged(FAILS, "not testable here", "", note="no such")]
    assert tables.claims_markdown(judged)[2:] == [
        "| fails | -5.1 | -3.0 [-4.0, -2.0] | holds |",
        "| fails | -5.1 |  | not testable here (no such) |",
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.claims_table(judged))
    assert all(len(line) <= 80 for line in console.export_text().splitlines())
