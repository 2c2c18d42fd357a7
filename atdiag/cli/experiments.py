"""A command for each installed ablation: resolve settings, train unfinished runs, report, write files, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atdiag.cli import planning, settling
from atdiag.cli.messages import RESERVED, as_typed, say
from atdiag.cli.options import BUDGET, EXPERIMENT, joined
from atdiag.cli.session import ExperimentSession, open_session
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.study import registry

if TYPE_CHECKING:
    from atdiag.core.runs import Store
    from atdiag.core.spec import RunSpec
    from atdiag.execution.plan import Plan
    from atdiag.study.builder import Lab
    from atdiag.study.own import Budget
    from atdiag.study.protocol import Series, Study
    from atdiag.study.settings import Settings

    Make = partial[Study | Series]
    """An ablation with its own options filled in; its remaining argument is the lab."""


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
            common = {name: option for name, option in {**EXPERIMENT, **BUDGET}.items() if name not in own}
            app.command(one.name)(joined(one.function, common, _run))


def _run(
    make: Make,
    dry_run: bool,
    json_: bool,
    out: Path | None,
    set_: list[str],
    budget: str | None = None,
    gpu: str | None = None,
    **given: Any,
) -> None:
    from atdiag.execution import devices
    from atdiag.reports import console, document, writers
    from atdiag.study.builder import Lab
    from atdiag.study.own import Budget

    wanted = Budget.parse(budget, gpu)
    if gpu is not None:
        given["device"] = given.get("device") or "cuda"
    session = open_session(set_=set_, **given)
    glance(make, session.settings)
    session = fitted(make, session, wanted)
    series = spread(make, Lab(session.settings))
    check_overrides(lambda lab: spread(make, lab).specs, series.specs, session.settings, set_)
    check_classes([series], session.settings)
    folder = document.folder(series, session.settings.profile.name, out.expanduser() if out else None)
    plan = session.plan(series.specs)
    if dry_run:
        planning.show(series, plan, session, json_)
        return
    if gpu is not None and not devices.is_here(plan.device):
        raise UserError(f"there is no {plan.device} device on this machine", "add `dry_run` to plan for one elsewhere")
    check([series], plan, session)
    planning.header(series, session)
    train([series], plan, session)
    reading = session.reading(series)
    written = writers.write_reading(reading, folder)
    steps = settling.steps(lambda settings: spread(make, Lab(settings)), reading, session)
    console.show_reading(reading, written.files, as_typed, [str(step) for step in steps])
    if json_:
        record = {**document.as_json(reading), "settle": [step.record() for step in steps], **written.record()}
        typer.echo(json.dumps(record))


def glance(make: Make, settings: Settings) -> None:
    """Raise UserError for a teacher that can't be meant, before anything is loaded that takes seconds."""
    from atdiag.networks.registry import teachers

    asked = make.keywords.get("teacher")
    if isinstance(asked, str) and asked != "all":
        for reference in references(asked):
            teachers.glance(reference, settings.profile.name, settings.profile.data.image_size)


def fitted(make: Make, session: ExperimentSession, budget: Budget | None) -> ExperimentSession:
    """Return the session with what is chosen for its teacher and its budget, if it has one of each."""
    from atdiag.study import own
    from atdiag.study.builder import Lab

    asked = make.keywords.get("teacher")
    if isinstance(asked, str) and asked != "all" and len(names := references(asked)) == 1:
        session = replace(session, settings=own.suited(session.settings, names[0]))
    if budget is None:
        return session

    def planned(settings: Settings) -> list[RunSpec]:
        series = spread(make, Lab(settings))
        return series.specs

    settings, choice = own.within(session.settings, budget, planned, session.store, session.options)
    return replace(session, settings=settings, choice=choice)


def check(series: Sequence[Series], plan: Plan, session: ExperimentSession) -> None:
    """Raise UserError, before training, if something can't be trained or measured."""
    from atdiag.execution import devices
    from atdiag.study import pipeline

    devices.resolve(plan.device)  # finished runs may still be measured
    if plan.todo:
        paths.fit_for_runs(session.store.root, "runs")
    pipeline.check(series, plan.todo)


def train(series: Sequence[Series], plan: Plan, session: ExperimentSession) -> None:
    """Train and measure what is missing, with progress bars."""
    from atdiag.execution import devices
    from atdiag.execution.run import execute
    from atdiag.reports import console
    from atdiag.study import pipeline

    planning.announce(plan, session)
    if plan.todo:
        with console.training(len(plan.specs), lambda: unfinished(plan, session.store)) as report:
            execute(plan.specs, session.store, session.options, report)
    with console.staged() as report:
        pipeline.measure(series, session.store, devices.resolve(session.options.device), report)


def unfinished(plan: Plan, store: Store) -> int:
    """Return how many runs of a plan are currently unfinished."""
    from atdiag.execution.plan import pending

    return len(pending(plan.specs, store))


def spread(make: Make, lab: Lab, leave_out: bool = False) -> Series:
    """Return an ablation's studies for the given teacher, for each of several (``a,b``), or for ``all``.

    For all teachers (with ``leave_out``: for several), those that the ablation refuses are left out, with a note in the
    series. Raises UserError for a refused teacher that was named, and if none is left.
    """
    from atdiag.study.protocol import Series

    asked = make.keywords.get("teacher")
    if not isinstance(asked, str) or (asked != "all" and "," not in asked):
        return Series.join([make(lab if asked is None else lab.suited(asked))])
    names = lab.teachers if asked == "all" else references(asked)
    if len(names) == 1:
        return Series.join([make(lab.suited(names[0]), teacher=names[0])])
    series = Series.of_each(
        names, lambda name: make(lab.suited(name), teacher=name), leave_out=leave_out or asked == "all"
    )
    return replace(series, notes=tuple(map(as_typed, series.notes)))  # why some teachers are left out


def references(text: str) -> tuple[str, ...]:
    """Split ``a,b`` into references to teachers, each once. An existing path is taken literally, including commas.

    Raises UserError if there are none.
    """
    from atdiag.core.selection import comma_separated

    rest = text.split(",")
    out: list[str] = []
    while rest:
        joined = (n for n in range(len(rest), 1, -1) if _is_file(",".join(rest[:n]).strip()))
        count = next(joined, 1)
        out.append(",".join(rest[:count]).strip())
        rest = rest[count:]
    found = tuple(dict.fromkeys(filter(None, out)))
    return found or comma_separated(text, "teacher", "clip_b,deit_b")


def _is_file(reference: str) -> bool:
    from atdiag.networks.weights.sources import split_branch, split_reference

    name, file, _ = split_reference(reference)
    named = "," not in name and file is not None and file.exists()  # else its first part is a reference of its own
    return named or split_branch(reference)[0].exists()


def check_overrides(
    plan: Callable[[Lab], list[RunSpec]], specs: list[RunSpec], settings: Settings, sets: list[str]
) -> None:
    """Raise UserError for a setting given with --set that changes none of the planned runs (``specs``)."""
    from atdiag.study import settings as profiles
    from atdiag.study.builder import Lab

    ids = {spec.id for spec in specs}
    for name in (item.partition("=")[0].strip() for item in sets):
        plain = profiles.without(settings, name)
        if plain is None or plain == settings.profile or _is_so(name, specs, settings):
            continue  # required, or equal to the default
        others = {key: value for key, value in settings.overrides.items() if key != name}
        try:
            without = plan(Lab(replace(settings, profile=plain, overrides=others)))
        except UserError:
            continue
        if ids == {spec.id for spec in without}:
            raise UserError(f"{name} has no effect here: it changes none of this experiment's runs", "leave it out")


def check_classes(several: Sequence[Series], settings: Settings) -> None:
    """Raise UserError for a list of classes if no teacher's own head is measured."""
    if settings.classes is not None and not any(study.reference for one in several for study in one.studies):
        raise UserError("`classes` has no effect here: no teacher's own head is measured", "leave it out")


def _is_so(name: str, specs: list[RunSpec], settings: Settings) -> bool:
    """Return whether a setting under ``transfer.`` has the value that some transfer already has."""
    section, _, field = name.partition(".")
    if section != "transfer":
        return False
    for spec in (spec for spec in specs if spec.transfer.method != "none"):
        own = spec.transfer
        asked = settings.profile.transfer.transfer(own.method, spec.network.depth, spec.network.heads)
        if getattr(own, field) is not None and getattr(asked, field) == getattr(own, field):
            return True
        if field == "heads" and own.heads is None is asked.heads and own.takes_attention:
            return True
    return False
