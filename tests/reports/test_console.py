"""Progress where standard error is no terminal: one line per change, and nothing else."""

from pathlib import Path

import pytest

from atdiag.core.progress import Progress
from atdiag.reports import console


def test_a_line_for_each_finished_run(capsys, monkeypatch):
    monkeypatch.setattr(console, "_REFRESH", 0)
    left = [3, 3, 2, 2, 0]
    with console.training(3, lambda: left.pop(0)) as report:
        report(Progress(0, 0, doing="waiting"))  # the number of finished runs is not even looked up
        for done in range(5):
            report(Progress(done, 4))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["waiting", "0/3 runs", "1/3 runs", "3/3 runs"]


def test_rapid_reports_do_not_scan_the_runs(monkeypatch):
    monkeypatch.setattr(console, "_REFRESH", 3600)
    asked = []
    with console.training(1, lambda: asked.append(1) or 1) as report:
        for done in range(100):
            report(Progress(done, 100))
    assert len(asked) == 1


def test_bars_print_nothing_without_a_terminal(capsys):
    with console.counted("reading", 2) as count, console.staged() as stage:
        count(1, 2)
        stage(Progress(1, 2, doing="measuring"))
        stage(Progress(0, 0, doing="more"))
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is_once_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.counted("reading", 2000) as count, console.staged() as stage:
        for now[0] in (30.0, 61.0, 80.0, 120.0, 122.0):
            count(int(10 * now[0]), 2000)
            stage(Progress(int(now[0]), 0, doing="maps"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: 610 of 2,000", "maps: 61", "reading: 1,220 of 2,000", "maps: 122"]


def test_paths_are_printed_literally(capsys):
    console.show_files([Path("[bold]a"), Path("b c")])
    assert capsys.readouterr().out == "  [bold]a\n  b c\n"


def test_files_of_one_stem_are_one_line(capsys):
    names = ["out/x.csv", "out/x.md", "out/x-0.5.png", "out/x-0.5.pdf", "other/x.csv", "out/x.json"]
    console.show_files([Path(name) for name in names])
    lines = ["out/x.csv  (and .md, .json)", "out/x-0.5.png  (and .pdf)", "other/x.csv"]
    assert capsys.readouterr().out.splitlines() == [f"  {line}" for line in lines]


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_no_column_of_a_table_is_cut(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    table = console.table("title", "arm", "top-1 %", "points vs scratch [95 %]", "p, Holm", "seeds")
    table.add_row("an arm of a long name", "12.6", "+2.8 [+0.6, +5.1]", "undertrained", "3")
    console.show_table(table)
    out = capsys.readouterr().out
    assert "p, Holm" in out and "seeds" in out and "undertrained" in out and "…" not in out


def test_a_table_of_names_and_numbers():
    table = console.table("title", "arm", "top-1 %", "seeds")
    assert [column.justify for column in table.columns] == ["left", "right", "right"]
