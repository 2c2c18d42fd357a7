"""Output of an experiment before training: what will be run, on what, at what cost.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from atdiag.api import experiments
from atdiag.core.spec.data import OF_SCENES
from atdiag.core.text import byte_size, count, duration
from atdiag.execution import elsewhere
from atdiag.reports import console
from atdiag.study.profiles import OWN_PROFILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atdiag.cli.session import ExperimentSession
    from atdiag.core.spec import Data, Network, Teacher
    from atdiag.execution.plan import Plan
    from atdiag.study.protocol import Series, Study
    from atdiag.study.settings import Settings


def header(series: Series, session: ExperimentSession) -> None:
    """Print what an experiment is about, and its scale; of a user's own images what was chosen, and why."""
    from atdiag.reports import tables

    settings = session.settings
    if settings.profile.name == OWN_PROFILE:
        from atdiag.cli import chosen

        for line in chosen.lines(series, session):
            typer.echo(line)
        _warnings(series.studies, settings)
        return
    typer.echo(f"atdiag {series.ablation}: {tables.subject(series)}")
    scale(series.studies, settings)
    if session.choice is not None:
        from atdiag.cli import chosen

        typer.echo(chosen.length(series, session))


def scale(studies: tuple[Study, ...], settings: Settings) -> None:
    """Print the data, the training length, and the origin of the teachers."""
    from atdiag.data import sources

    def images(one: Data) -> str:
        held = sources.find(one).validation_images(one)
        return f"{one.name}, {one.train:,} training images" + (f" and {held:,} for validation" if held else "")

    arms = [arm.specs[0] for study in studies for arm in study.arms]
    data = ", ".join(dict.fromkeys(images(spec.data) for spec in arms))
    epochs = sorted({spec.recipe.epochs for spec in arms} - {0}) or [0]  # without probes of teachers
    length = count(epochs[0], "epoch") if len(epochs) == 1 else f"{' or '.join(map(str, epochs))} epochs"
    typer.echo(
        f"profile {settings.profile.name}: {data} x {length}, {count(len(settings.seeds), 'seed')}{which(settings)}"
    )
    _warnings(studies, settings)


def _warnings(studies: tuple[Study, ...], settings: Settings) -> None:
    """Print what a reader must not overlook: files left out, stand-ins for teachers, missing weights, overrides."""
    from atdiag.data import folder_sets
    from atdiag.networks.registry import specimens, teachers

    arms = [arm.specs[0] for study in studies for arm in study.arms]
    for name in dict.fromkeys(spec.data.name for spec in arms):
        if note := folder_sets.left_out(name):
            typer.echo(f"{name}: {note}")
    distinct = list({study.teacher.label: study.teacher for study in studies}.values())
    if minis := [teacher for teacher in distinct if teachers.is_miniature(teacher)]:
        whose = f"{teachers.row(minis[0].name).title}'s architecture" if len(minis) == 1 else "their architectures"
        what = "this teacher is a miniature" if len(minis) == 1 else "these teachers are miniatures"
        typer.echo(f"{what} of {whose}; the published one{'s'[: len(minis) - 1]}: --profile small, or paper")
    for teacher in filter(specimens.is_specimen, distinct):
        fault = specimens.specimen(teacher.name).planted
        typer.echo(f"{teacher.name} is a specimen, no published teacher: {fault} (planted)")
    if missing := [teacher for teacher in distinct if teacher.sha256 is None]:
        if len(distinct) == 1:
            typer.echo(f"its weights are not on this machine: {teachers.how_to_get(missing[0])}")
        else:
            typer.echo(f"the weights of {names(missing)} are not on this machine: {teachers.how_to_get(missing[0])}")
    if settings.file is not None and settings.file.parent != Path():
        typer.echo(f"settings of {settings.file}")
    own = settings.profile.name == OWN_PROFILE  # whose first lines name the folder and its division
    told = {k: v for k, v in settings.told.items() if not (own and k in ("data.name", "data.split"))}
    if told:
        typer.echo("overrides: " + ", ".join(f"{name}={value}" for name, value in sorted(told.items())))


def which(settings: Settings) -> str:
    """Name the seeds where they do not begin at 0."""
    first, last = settings.seeds[0].data, settings.seeds[-1].data
    if not first:
        return ""
    return f" ({first})" if first == last else f" ({first} to {last})"


def announce(plan: Plan, session: ExperimentSession) -> None:
    """Print how much is to be trained, and the estimated time."""
    store, settings = session.store, session.settings
    own = settings.profile.name == OWN_PROFILE  # otherwise said before
    seeds = f"{count(len(settings.seeds), 'seed')}{which(settings)}: " if own else ""
    if not plan.todo:
        typer.echo(f"{seeds}{count(len(plan.specs), 'run')}, all finished before: nothing to train")
        return
    _elsewhere(plan, session)
    begun = sum(store.run(spec).checkpoint.exists() for spec in plan.todo)
    go_on = f" ({begun} go on from their checkpoints)" if begun else ""
    ranks = session.options.ranks
    todo = (
        f"{seeds}{count(len(plan.specs), 'run')}, {len(plan.specs) - len(plan.todo)} finished before; "
        f"{len(plan.todo)} to do{go_on}"
    )
    if plan.device == "cuda":
        typer.echo(f"{todo}: about {on_devices(plan)}")
    else:
        what = "task" if session.on_cluster else "process"
        of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
        where = f"in {count(min(plan.processes, len(plan.todo)), what)}{of_ranks} on {plan.device}"
        typer.echo(f"{todo} {where}: about {duration(plan.seconds)}")


def _elsewhere(plan: Plan, session: ExperimentSession) -> None:
    """Print where nearby some of the runs to do are finished."""
    if found := elsewhere.finished(session.store, plan.todo):
        place, number = found
        verb = "is" if number == 1 else "are"
        typer.echo(f"{count(number, 'run')} of these {verb} finished in {place}: --runs {place} takes them")


def on_devices(plan: Plan) -> str:
    """Format what a plan costs on GPUs: ``412 GPU-hours, 53 h on 8 h100 (326 TFLOP/s each, measured)``."""
    rate = f"{plan.device_speed / 1e12:.3g} TFLOP/s each, {plan.basis}"
    name = plan.gpu or "GPU"
    hours = plan.device_seconds / 3600
    spent = f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"
    many = f"{plan.devices} {name}" if plan.gpu else count(plan.devices, name)
    return f"{spent} GPU-hours, {duration(plan.seconds)} on {many} ({rate})"


def _disk(plan: Plan) -> str:
    """Format the disk that the unfinished runs of a plan take."""
    from atdiag.execution import cost

    disk = cost.disk(plan.todo)
    return f"{byte_size(round(disk.finished))} when finished, up to {byte_size(round(disk.training))} more in training"


def show(series: Series, plan: Plan, session: ExperimentSession, json_: bool) -> None:
    """Print the full plan of an experiment."""
    from rich.table import Table

    from atdiag.execution import cost

    settings, store = session.settings, session.store
    header(series, session)
    own = settings.profile.name == OWN_PROFILE
    if own:
        announce(plan, session)
    table = Table(title=f"{series.ablation}: what would be run", title_justify="left")
    unit = "GPU-s" if plan.device == "cuda" else "thread-s"
    for name in ("arm", "seed", "run", "state", unit):
        table.add_column(name, justify="right" if name in ("seed", unit) else "left", no_wrap=name != "arm")
    planned = experiments.planned(series)
    for name, spec in planned:
        seconds = f"{cost.seconds(spec, plan.speed):.0f}"
        table.add_row(name, str(spec.seed.model), spec.id, store.run(spec).state, seconds)
    console.show_table(table)
    if not own and plan.device == "cuda":
        typer.echo(f"{count(len(plan.specs), 'run')}, {len(plan.todo)} to do, about {on_devices(plan)}.")
    elif not own:
        typer.echo(
            f"{count(len(plan.specs), 'run')}, {len(plan.todo)} to do, about {duration(plan.seconds)} in "
            f"{count(plan.processes, 'process')} on {plan.device}."
        )
    if plan.todo:
        if not own:
            _elsewhere(plan, session)
        typer.echo(f"Disk: {_disk(plan)}.")
    for measure in measures(series):
        typer.echo(f"Then, of finished runs: {measure}.")
    for note in dict.fromkeys([*series.notes, *(note for study in series.studies for note in study.notes)]):
        typer.echo(f"- {note}")
    if any(study.teacher.sha256 is None for study in series.studies):
        typer.echo("Ids of runs that need the teacher will change, since they include its weights' sha256.")
    for name, document in _resolved(series, settings).items():
        typer.echo(f"{name}: " + ", ".join(f"{k}={_short(v)}" for k, v in document.items() if v not in (None, [], ())))
    networks = {spec.network: name for name, spec in reversed(planned) if spec.recipe.epochs}
    for network, name in sorted(networks.items(), key=lambda pair: len(pair[0].components)):
        typer.echo(f"network of {name}: {_size(network)}")
    if json_:
        runs = [
            {"arm": name, "run": s.id, "state": store.run(s).state, "spec": s.model_dump(mode="json")}
            for name, s in planned
        ]
        record: dict[str, Any] = {"ablation": series.ablation, "seconds": round(plan.seconds), "runs": runs}
        disk = cost.disk(plan.todo)
        record["plan"] = {
            "device": plan.device,
            "gpu": plan.gpu,
            "devices": plan.devices,
            "device_seconds": round(plan.device_seconds),
            "flops_per_second": round(plan.speed),
            "basis": plan.basis,
            "disk_bytes": {"finished": round(disk.finished), "training": round(disk.training)},
        }
        typer.echo(json.dumps(record))


def measures(series: Series) -> list[str]:
    """Return the names of the measurements of finished runs."""
    return list(dict.fromkeys(measure.name for study in series.studies for measure in study.measures))


def _resolved(series: Series, settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the settings of its runs: data, transfer, recipes, student."""
    profile = settings.profile
    scenes: set[str] = set(OF_SCENES) if profile.data.image_size else set()
    form = profile.transfer.model_dump(mode="json", exclude_defaults=True)
    resolved = {
        "data": profile.data.model_dump(mode="json", exclude=scenes),
        "transfer": form or {"layers": "all", "heads": "all", "tensor": "map"},
    }
    trained = {spec.recipe for study in series.studies for arm in study.arms for spec in arm.specs}
    for recipe in dict.fromkeys(profile.recipe.values()):
        if recipe in trained:
            of = [method for method, one in profile.recipe.items() if one == recipe]
            name = "recipe" if len(trained) == 1 else f"recipe of {', '.join(of)}"
            resolved[name] = recipe.model_dump(mode="json")
    resolved["student"] = series.studies[0].arms[0].specs[0].network.model_dump(mode="json")
    return resolved


def _size(network: Network) -> str:
    """Format a network's size: ``standard, 22.1 M parameters, 4.6 GFLOPs per image``."""
    from atdiag.networks.model import students

    parts = ", ".join(network.components) or "standard"
    parameters, flops = students.parameters(network), students.flops(network)
    return f"{parts}; {parameters / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOPs per image"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def names(teachers: Sequence[Teacher], most: int = 6) -> str:
    """Format teachers' names: ``deit_s, dino_s and 9 others``."""
    labels = [teacher.label for teacher in teachers]
    rest = len(labels) - most
    return ", ".join(labels) if rest <= 1 else f"{', '.join(labels[:most])} and {rest} others"
