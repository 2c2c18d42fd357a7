"""A command for each installed ablation: resolve settings, train unfinished runs, report, write files, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atdiag.api import experiments
from atdiag.api.experiments import check as check
from atdiag.api.experiments import check_classes as check_classes
from atdiag.api.experiments import check_overrides as check_overrides
from atdiag.api.experiments import references as references
from atdiag.api.experiments import spread as spread
from atdiag.cli import fleet, planning, settling
from atdiag.cli.messages import RESERVED, as_typed, say
from atdiag.cli.options import EXPERIMENT, SINGLE, WAIT, joined
from atdiag.core.errors import UserError
from atdiag.study import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atdiag.api.experiments import Make
    from atdiag.api.sessions import ExperimentSession
    from atdiag.execution.plan import Plan
    from atdiag.study.protocol import Series


def add_commands(app: typer.Typer) -> None:
    """Add a command for each installed ablation: its own options, then those common to all experiments."""
    taken: set[str] = set()
    for one in registry.installed():
        if one.name in taken or one.name in RESERVED:
            say(f"the experiment {one.name!r} of {one.source} is left out: that name is taken")
        elif one.function is None:
            say(f"the experiment {one.name!r} of {one.source} can't be loaded ({one.fault})")
        else:
            taken.add(one.name)
            own = inspect.signature(one.function).parameters  # ``datasets`` has a ``--data`` of its own
            common = {name: option for name, option in {**EXPERIMENT, **SINGLE, **WAIT}.items() if name not in own}
            app.command(one.name)(joined(one.function, common, _run))


def _run(
    make: Make,
    dry_run: bool,
    json_: bool,
    out: Path | None,
    set_: list[str],
    budget: str | None = None,
    gpu: str | None = None,
    wait: bool = False,
    **given: Any,
) -> None:
    from atdiag.execution import devices
    from atdiag.reports import console, document, writers

    ready = experiments.prepare(make, set_, as_typed, budget=budget, gpu=gpu, dry_run=dry_run, **given)
    series, plan, session = ready.series, ready.plan, ready.session
    folder = document.folder(series, session.settings.profile.name, out.expanduser() if out else None)
    if dry_run:
        planning.show(series, plan, session, json_)
        return
    if wait and not session.on_cluster:
        raise UserError("`wait` follows jobs of a cluster", "add `executor` slurm, or leave it out")
    if gpu is not None and not session.on_cluster and not devices.is_here(plan.device):
        raise UserError(f"there is no {plan.device} device on this machine", "add `dry_run` to plan for one elsewhere")
    check([series], plan, session)
    planning.header(series, session)
    if session.on_cluster and plan.todo and not wait:
        fleet.submit([series], plan, session, json_)
        return
    train([series], plan, session)
    reading = session.reading(series)
    written = writers.write_reading(reading, folder)
    from atdiag.study.builder import Lab

    steps = settling.steps(lambda settings: spread(make, Lab(settings)), reading, session)
    console.show_reading(reading, written.files, as_typed, [str(step) for step in steps])
    if json_:
        record = {**document.as_json(reading), "settle": [step.record() for step in steps], **written.record()}
        typer.echo(json.dumps(record))


def train(series: Sequence[Series], plan: Plan, session: ExperimentSession) -> None:
    """Train and measure what is missing, after a line on how much that is."""
    planning.announce(plan, session)
    experiments.train(series, plan, session)
