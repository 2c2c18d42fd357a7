"""Terminal output: progress bars, tables, and a reading with its verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atdiag.core.progress import OnProgress, Progress
from atdiag.core.text import duration
from atdiag.reports import tables
from atdiag.reports.notebook import NotebookBar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn
    from rich.table import Table

    from atdiag.study.protocol import Reading

_REFRESH = 0.5
"""Seconds between two counts of the finished runs, which read the state of each."""
_MINUTE = 60.0
"""Seconds after which a log that is no terminal gets a line, if nothing else was said."""


def bar(*columns: ProgressColumn) -> Bar | NotebookBar:
    """Return a progress bar on standard error that is transient, and hidden if that is not a terminal or a notebook."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if console.is_jupyter:
        return NotebookBar(console)
    return Bar(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def counted(description: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar inside the context, elsewhere than on a terminal a line a minute.

    Yields the callback (done, total).
    """
    with staged() as report:
        report(Progress(0, total or 0, doing=description))
        yield lambda done, total: report(Progress(done, total, doing=description))


@contextlib.contextmanager
def staged() -> Iterator[OnProgress]:
    """Show a named progress bar for each stage in turn, elsewhere than on a terminal a line a minute."""
    said_at = time.monotonic()
    with bar() as shown:
        tasks: dict[str, int] = {}

        def report(now: Progress) -> None:
            nonlocal said_at
            if now.doing not in tasks:
                tasks[now.doing] = shown.add_task(now.doing, total=None)
            shown.update(tasks[now.doing], completed=now.done, total=now.total or None)  # type: ignore[arg-type]
            if not _is_watched(shown) and time.monotonic() - said_at >= _MINUTE:
                said_at = time.monotonic()
                of = f" of {now.total:,}" if now.total else ""
                shown.console.print(f"{now.doing}: {now.done:,}{of}", highlight=False, markup=False)

        yield report


def _is_watched(shown: Bar | NotebookBar) -> bool:
    """Return whether a bar is seen, on a terminal or in a notebook."""
    return shown.console.is_terminal or shown.console.is_jupyter


@contextlib.contextmanager
def training(runs: int, unfinished: Callable[[], int]) -> Iterator[OnProgress]:
    """Show training progress: a bar on a terminal, elsewhere a line for each finished run, and one a minute.

    unfinished: returns the number of unfinished runs.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    said, said_at, looked, begun = "", time.monotonic(), 0.0, time.monotonic()
    with bar(*columns) as shown:
        task = shown.add_task("starting", total=None, rate="")

        def report(now: Progress) -> None:
            nonlocal said, said_at, looked
            if time.monotonic() < looked + _REFRESH:
                return
            looked = time.monotonic()
            elapsed = shown.tasks[0].elapsed or 0
            rate = f"{now.images / elapsed:.0f} images/s" if now.images and elapsed else ""
            text = f"{runs - unfinished()}/{runs} runs" if now.total else now.doing
            shown.update(task, completed=now.done, total=now.total or None, rate=rate, description=text)
            if _is_watched(shown):
                return
            if text != said or looked - said_at >= _MINUTE:
                more = f", {_far(now, looked - begun)}" if text == said else ""
                said, said_at = text, looked
                shown.console.print(f"{text}{more} {rate}".rstrip(), highlight=False, markup=False)

        yield report


def _far(now: Progress, seconds: float) -> str:
    """Format how far a training is: ``34 % of the steps after 12 min, testing``."""
    share = f"{100 * now.done / now.total:.0f} % of the steps " if now.total else ""
    doing = f", {now.doing}" if now.total and now.doing not in ("", "training") else ""
    return f"{share}after {duration(seconds)}{doing}"


def table(title: str, *columns: str) -> Table:
    """Return an empty table for the terminal: names in the first column, numbers in the others."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    return out


def show_table(table: Table, highlight: bool = True) -> None:
    """Print a table that no terminal cuts: one that needs more columns than there are is wrapped by the terminal."""
    from rich.console import Console

    fitting = Console(markup=False)  # names of files, classes and arms may have brackets
    wide = fitting.options.update(max_width=10_000)
    for column in table.columns:
        if column.no_wrap:  # which alone does not keep rich from cutting it
            cells = [fitting.measure(cell, options=wide).maximum for cell in (column.header, *column.cells)]
            column.min_width = max(column.min_width or 0, *cells)
    needed = fitting.measure(table, options=wide).minimum
    Console(width=max(fitting.width, needed), markup=False).print(table, highlight=highlight)


def show_verdict(text: str) -> None:
    """Print a verdict, with an empty line above and below."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble("\n", ("Verdict", "bold"), f"  {text}\n"))


def show_reading(
    reading: Reading, files: Sequence[Path], spoken: Callable[[str], str] = str, steps: Sequence[str] = ()
) -> None:
    """Print a reading's verdict, table, claims, notes and files; ``spoken`` spells out the arguments named in texts.

    steps: lines after the notes, on what would settle what is undecided.
    """
    from rich.console import Console

    console = Console(markup=False)
    show_verdict(spoken(reading.verdict))
    show_table(tables.terminal(reading))
    if tested := [one for one in reading.judged if one.verdict != "not testable here"]:
        show_table(tables.claims_table(tested))
    for note in tables.notes(reading):
        console.print(f"- {spoken(note)}", style="dim", highlight=False)
    console.print()
    for step in steps:
        console.print(step, highlight=False, soft_wrap=True)
    if steps:
        console.print()
    show_files(files)


def show_files(files: Sequence[Path]) -> None:
    """Print paths without interpreting markup: a line for each folder and stem, with the kinds of its files.

    ``results/reinit-clip_b-mini/attn-copy-1cbcce.csv  (and .md, .json, .png)``; the first is a whole path.
    """
    kinds: dict[Path, list[Path]] = {}
    for path in files:
        kinds.setdefault(path.with_suffix(""), []).append(path)
    for first, *others in kinds.values():
        print(f"  {first}" + (f"  (and {', '.join(path.suffix for path in others)})" if others else ""))
