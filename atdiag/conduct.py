"""Bring a series to its answer: train what is not finished, measure, read, write, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from atdiag import folders
from atdiag.planning import duration
from atdiag.planning import names as names_of
from atdiag.words import count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.progress import Progress, TaskID

    from atdiag.runs import Store
    from atdiag.spec import RunSpec
    from atdiag.study.ablation import Measurement, Reading, Series
    from atdiag.study.profile import Settings


def check_weights(specs: Sequence[RunSpec], store: Store) -> None:
    """Raise UserError where the file of a published teacher is here and is not what it should be.

    Loads it as a training process would, which takes seconds; runs that are finished do not need it.
    """
    from atdiag.networks import teachers, weights
    from atdiag.study import schedule

    todo = schedule.pending(specs, store)
    for teacher in dict.fromkeys(spec.teacher for spec in todo if spec.teacher is not None):
        if teacher.sha256 is not None and not teachers.is_miniature(teacher):
            weights.load(teacher)


def check(series: Sequence[Series], store: Store) -> None:
    """Raise UserError, before anything is trained, where images or weights are not here or not what they should be.

    Images of the runs that are not finished, and of what is measured afterwards; weights of all teachers.
    """
    from atdiag.data import names
    from atdiag.networks import teachers
    from atdiag.study import schedule
    from atdiag.words import UserError

    todo = schedule.pending([spec for one in series for spec in one.specs], store)
    if todo:
        folders.writable(store.root, "--runs")
    if sets := {spec.data: spec.network for spec in todo if names.is_real(spec.data.name)}:
        from atdiag.data import datasets

        for data, network in sets.items():
            datasets.check(data, network)
    studies = [study for one in series for study in one.studies]
    if plans := list({s.teacher.label: s.teacher for s in studies if s.teacher.sha256 is None}.values()):
        raise UserError(f"the weights of {names_of(plans)} are not on this machine", teachers.how_to_get(plans[0]))
    for measurement, specs in wanted(series):
        measurement.check(specs)


def execute(
    specs: Sequence[RunSpec],
    settings: Settings,
    store: Store,
    device: str,
    micro_batch: int | None = None,
    deterministic: bool = False,
) -> None:
    """Train what is not finished, and say how much that is and about how long it takes."""
    from atdiag.study import schedule

    todo = schedule.pending(specs, store)
    threads = settings.profile.threads
    processes = min(schedule.processes_for(device, threads), max(len(todo), 1))
    if not todo:
        typer.echo(f"{count(len(specs), 'run')}, all finished before: nothing to train")
        return
    cost = duration(schedule.estimate(todo, processes, schedule.measured_speed(store, device)))
    begun = sum(store.run(spec).checkpoint.exists() for spec in todo)
    go_on = f" ({begun} go on from their checkpoints)" if begun else ""
    typer.echo(
        f"{count(len(specs), 'run')}, {len(specs) - len(todo)} finished before; "
        f"{len(todo)} to do{go_on} in {count(processes, 'process')} on {device}: about {cost}"
    )
    train(list(specs), store, device, threads, micro_batch, deterministic)


def train(
    specs: list[RunSpec],
    store: Store,
    device: str,
    threads: int | None,
    micro_batch: int | None = None,
    deterministic: bool = False,
) -> None:
    """Bring runs to their end, with a progress bar on a terminal and a line for each finished run elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from atdiag.study import schedule

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    said, looked = "", 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None, rate="")

        def tick(now: schedule.Tick) -> None:
            nonlocal said, looked
            if time.monotonic() < looked + 0.5:  # every look asks for the state of each run
                return
            looked = time.monotonic()
            elapsed = bar.tasks[0].elapsed or 0
            rate = f"{now.images / elapsed:.0f} images/s" if now.images and elapsed else ""
            done = len(specs) - len(schedule.pending(specs, store))
            text = f"{done}/{len(specs)} runs" if now.total else now.doing
            bar.update(task, completed=now.done, total=now.total or None, rate=rate, description=text)
            if not console.is_terminal and text != said:
                said = text
                console.print(f"{text} {rate}".rstrip(), highlight=False)

        schedule.execute(specs, store, device, threads, tick, micro_batch, deterministic)


def wanted(series: Sequence[Series]) -> list[tuple[Measurement, list[RunSpec]]]:
    """Every measurement once, with the runs that it is to be taken of."""
    found: dict[str, tuple[Measurement, dict[str, RunSpec]]] = {}
    for study in (study for one in series for study in one.studies):
        for measurement in study.measures:
            _, specs = found.setdefault(measurement.name, (measurement, {}))
            specs |= {spec.id: spec for spec in study.specs}
    return [(measurement, list(specs.values())) for measurement, specs in found.values()]


def measure(series: Sequence[Series], store: Store, device: str) -> None:
    """Take of the finished runs what has not been taken, with a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for measurement, specs in wanted(series):
            if missing := measurement.missing([store.run(spec) for spec in specs]):
                task = bar.add_task(measurement.name, total=None)
                measurement.take(missing, device, _ticker(bar, task))


def _ticker(bar: Progress, task: TaskID) -> Callable[[int, int], None]:
    return lambda done, total: bar.update(task, completed=done, total=total)


def write(reading: Reading, folder: Path) -> list[Path]:
    """Write tables, figure and caption; nothing of another experiment is touched."""
    from atdiag.runs import write_atomically
    from atdiag.study import outputs, tables

    folder.mkdir(parents=True, exist_ok=True)
    stem = outputs.slug(reading.series)
    paths = {kind: folder / f"{stem}.{kind}" for kind in ("csv", "md", "tex", "json", "txt", "png", "pdf")}
    write_atomically(paths["csv"], tables.frame(reading).to_csv(index=False))
    write_atomically(paths["md"], tables.markdown(reading))
    write_atomically(paths["tex"], tables.latex(reading))
    write_atomically(paths["txt"], outputs.caption(reading))
    draw(reading, paths["png"], paths["pdf"])
    write_atomically(paths["json"], json.dumps(outputs.as_json(reading, list(paths.values())), indent=1))
    return list(paths.values())


def draw(reading: Reading, *paths: Path) -> None:
    """Draw the figure that a series names."""
    from figures import style

    name = reading.series.figure or reading.reports[0].study.figure
    found = [entry for entry in entry_points(group="atdiag.figures") if entry.name == name]
    if not found:
        raise ValueError(f"no figure named {name!r} is installed")
    figure = found[0].load()(reading if reading.series.figure else reading.reports[0])
    style.save(dict.fromkeys(paths, figure))


def tell(reading: Reading, files: Sequence[Path]) -> None:
    """Print table, claims, notes, verdict and the files."""
    from rich.console import Console

    from atdiag.study import tables

    console = Console()
    console.print(tables.terminal(reading))
    if tested := [one for one in reading.judged if one.verdict != "not testable here"]:
        console.print(tables.claims_table(tested))
    for note in tables.notes(reading):
        console.print(f"- {note}", style="dim", highlight=False)
    console.print(f"\n[bold]Verdict[/bold]  {reading.verdict}\n", highlight=False)
    for path in files:
        typer.echo(f"  {path}")
