"""Clusters and onlookers: what a submission says, and ``atdiag runs watch``.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.api import experiments
from atdiag.cli import planning
from atdiag.cli.options import Json, Runs
from atdiag.core.text import count, duration, shortlist
from atdiag.reports import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from atdiag.cli.session import ExperimentSession
    from atdiag.core.runs import Store
    from atdiag.execution.plan import Plan
    from atdiag.execution.watching import Group, StoreView
    from atdiag.study.protocol import Series

_SHOWN = 30
"""Groups that are shown at most."""


def submit(series: Sequence[Series], plan: Plan, session: ExperimentSession, json_: bool) -> None:
    """Submit what is neither finished nor queued, and say what is where."""
    from atdiag.execution import slurm

    planning.announce(plan, session)
    before = slurm.queue(session.store.root.absolute() / "slurm")
    made = experiments.submit(series, plan, session)
    wanted = {spec.id for spec in plan.todo}
    found = [one for one in before if not one.task.ended and one.runs & wanted]
    if found:
        runs = len(wanted & {run for one in found for run in one.runs})
        jobs = shortlist(dict.fromkeys(one.task.job for one in found))
        typer.echo(
            f"in the queue before: {count(runs, 'run')} in job {jobs}, {slurm.told([one.task for one in found])}"
        )
    for one in made:
        at_once = f", {one.at_once} at once" if one.at_once < one.tasks else ""
        typer.echo(
            f"submitted job {one.job}: {count(one.runs, 'run')} in {count(one.tasks, 'task')}{at_once}, "
            f"time limit {one.limit}; orders and logs in {one.folder}"
        )
    typer.echo("the same line shows the table when they are finished; --wait follows them, as does 'atdiag runs watch'")
    if json_:
        record: dict[str, Any] = {
            "submitted": [
                {
                    "job": one.job,
                    "tasks": one.tasks,
                    "runs": one.runs,
                    "time_limit": one.limit,
                    "folder": str(one.folder),
                }
                for one in made
            ],
            "queued_before": sorted(wanted & {run for one in found for run in one.runs}),
        }
        typer.echo(json.dumps(record))


# --- looking on ----------------------------------------------------------------------------------------------------

_Once = Annotated[bool, typer.Option("--once", help="Look once, and end.")]
_Every = Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="Time between two looks.")]


def watch(runs: Runs = None, once: _Once = False, every: _Every = 5.0, json_: Json = False) -> None:
    """Look on while runs are trained anywhere.

    Cohorts, nodes, rates, time left, failures, from run directories alone. Ctrl-C ends it. Off a terminal a line a
    minute, with --json one JSON record for each look; both end when nothing is trained any more.
    """
    from rich.console import Console

    from atdiag.cli.runs import store_of
    from atdiag.execution import watching

    store, terminal = store_of(runs), Console()
    if once or json_ or not terminal.is_terminal:
        _print(store, once, max(every, 60.0) if not json_ else every, json_)
        return
    from rich.live import Live

    with Live(console=terminal, auto_refresh=False, transient=False) as live:
        try:
            while True:
                live.update(_screen(watching.look(store), store), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt:  # the way to end it
            return


def _print(store: Store, once: bool, every: float, json_: bool) -> None:
    """Print a look at intervals until nothing is trained, or a single one."""
    from atdiag.execution import watching

    while True:
        view = watching.look(store)
        if json_:
            typer.echo(json.dumps(view.record()))
        elif once:
            console.show_table(_screen(view, store))
        else:
            typer.echo(f"{time.strftime('%H:%M:%S')}  {line(view)}")
        if once or not view.groups:
            return
        time.sleep(every)


def line(view: StoreView) -> str:
    """Format a view on one line: ``3 finished, 2 training; 812 images/s on 2 devices; about 2.1 h left``."""
    parts = [", ".join(f"{number:,} {state}" for state, number in view.states.items()) or "no runs"]
    if rates := [group.images_per_second for group in view.groups if group.images_per_second]:
        parts.append(f"{sum(rates):,.0f} images/s in {count(len(view.groups), 'cohort')}")
    if view.seconds_left is not None:
        parts.append(f"about {duration(view.seconds_left)} left for these")
    if view.failures:
        run, cause = view.failures[0]
        parts.append(f"failed: {run[:12]} ({cause})")
    return "; ".join(parts)


def _screen(view: StoreView, store: Store) -> Table:
    """Return the table of a view."""
    table = console.table(
        f"{store.root}: {line(view)}", "cohort", "runs", "steps", "images/s", "left", "where", "doing"
    )
    for group in view.groups[:_SHOWN]:
        share = f"{group.done:,}/{group.total:,}" if group.total else ""
        rate = f"{group.images_per_second:,.0f}" if group.images_per_second else ""
        left = duration(group.seconds_left) if group.seconds_left is not None else ""
        doing = f"silent for {duration(group.age)}" if group.silent else group.doing
        table.add_row(group.runs[0][:12], str(len(group.runs)), share, rate, left, _where(group), doing)
    if len(view.groups) > _SHOWN:
        table.add_row(f"and {len(view.groups) - _SHOWN} more", *[""] * 6)
    for run, cause in view.failures[:_SHOWN]:
        table.add_row(run[:12], "1", "", "", "", "", f"failed: {cause}")
    for name in ("where", "doing"):
        column = next(column for column in table.columns if column.header == name)
        column.justify, column.no_wrap = "left", name == "where"
    return table


def _where(group: Group) -> str:
    job = f", job {group.job}" if group.job else ""
    return f"{group.host}, {group.device}{job}" if group.host else ""
