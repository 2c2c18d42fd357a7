"""A command for each installed ablation: resolve the settings, train what is not finished, report, write, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import folders
from atdiag.options import DataDir, Json, Profile, Runs, Set, joined

if TYPE_CHECKING:
    from atdiag.runs import Store
    from atdiag.spec import Network, RunSpec
    from atdiag.study.ablation import Lab, Report, Study
    from atdiag.study.profile import Settings

_Seeds = Annotated[int | None, typer.Option(help="How many seeds. [default: the profile's; mini: 3]")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be run, what is finished, and the cost.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Folder for table and figure. [default: ./results/<ablation>-<teacher>-<profile>]"),
]
_Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the profile's; mini: cpu]")]

_COMMON: dict[str, tuple[Any, Any]] = {
    "profile": (Profile, None),
    "set_": (Set, []),
    "seeds": (_Seeds, None),
    "dry_run": (_DryRun, False),
    "json_": (Json, False),
    "out": (_Out, None),
    "runs": (Runs, None),
    "device": (_Device, None),
    "data_dir": (DataDir, None),
}
"""The options that every experiment has: annotation and default."""


def add_commands(app: typer.Typer) -> None:
    """A command for each installed ablation: its own options, then those that all experiments have."""
    taken: dict[str, str] = {}
    # Ours first, so that no other package can take the name of one by accident.
    for entry in sorted(
        entry_points(group="atdiag.ablations"), key=lambda entry: not entry.value.startswith("ablations.")
    ):
        if entry.name in taken or entry.name in RESERVED:
            say(f"the experiment {entry.name!r} of {entry.value} is left out: that name is taken")
            continue
        try:
            command = joined(entry.load(), _COMMON, _run)
        except Exception as fault:  # another package's fault must not take this one's commands away
            say(f"the experiment {entry.name!r} of {entry.value} can't be loaded ({type(fault).__name__}: {fault})")
            continue
        taken[entry.name] = entry.value
        app.command(entry.name)(command)


RESERVED = (
    "teachers",
    "pretrain",
    "doctor",
    "runs",
    "data",
    "trace",
    "similarity",
    "intervene",
    "probe",
    "attention-stats",
    "maps",
)
"""Names of commands that are no experiments."""


def say(text: str) -> None:
    """Tell the user something in one line, on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)


def _run(
    make: Callable[[Lab], Study],
    profile: str | None,
    set_: list[str],
    seeds: int | None,
    dry_run: bool,
    json_: bool,
    out: Path | None,
    runs: Path | None,
    device: str | None,
    data_dir: Path | None,
) -> None:
    from atdiag.networks import teachers
    from atdiag.runs import Store
    from atdiag.study import profile as profiles
    from atdiag.study import schedule, tables
    from atdiag.study.ablation import Lab, report
    from atdiag.training import compiled
    from atdiag.words import UserError

    if data_dir is not None:
        folders.look_in(data_dir)
    compiled.choice()
    settings = profiles.resolve(profile, seeds, set_, runs)
    device = schedule.choose_device(device or settings.profile.device)
    study = make(Lab(settings))
    _check_overrides(make, study, settings, [item.partition("=")[0].strip() for item in set_])
    store = Store(settings.runs)
    folder = tables.output_folder(study, settings.profile.name, out.expanduser() if out else None)
    tables.writable(settings.runs, "--runs")
    _check_weights(study, store)
    if dry_run:
        _show_plan(study, settings, store, device, json_)
        return
    _check_data(study, store)
    if study.teacher.sha256 is None:
        raise UserError(
            f"the weights of {study.teacher.label} are not on this machine", teachers.how_to_get(study.teacher)
        )
    _header(study, settings)
    _execute(study, settings, store, device)
    finished = report(study, settings, store)
    files = _write(finished, folder)
    from rich.console import Console

    console = Console()
    console.print(tables.terminal(finished))
    for note in tables.notes(finished):
        console.print(f"- {note}", style="dim", highlight=False)
    console.print(f"\n[bold]Verdict[/bold]  {finished.verdict}\n", highlight=False)
    for path in files:
        typer.echo(f"  {path}")
    if json_:
        typer.echo(json.dumps(tables.as_json(finished, files)))


def _check_overrides(make: Callable[[Lab], Study], study: Study, settings: Settings, names: list[str]) -> None:
    """Raise UserError for a name given with --set that changes no run of the study."""
    from atdiag.study import profile as profiles
    from atdiag.study.ablation import Lab
    from atdiag.words import UserError

    ids = {spec.id for spec in study.specs}
    for name in names:
        plain = profiles.without(settings, name)
        if plain is None or plain == settings.profile or _is_so(name, study, settings):
            continue  # it can't be left out, or says what is so anyway
        try:
            others = make(Lab(replace(settings, profile=plain)))
        except UserError:
            continue
        if ids == {spec.id for spec in others.specs}:
            raise UserError(f"{name} has no effect here: it changes none of this experiment's runs", "leave it out")


def _is_so(name: str, study: Study, settings: Settings) -> bool:
    """Whether a setting under ``transfer.`` names what some transfer of the study is in any case."""
    section, _, field = name.partition(".")
    if section != "transfer":
        return False
    for spec in (spec for arm in study.arms for spec in arm.specs if spec.transfer.method != "none"):
        own = spec.transfer
        asked = settings.profile.transfer.transfer(own.method, spec.network.depth, spec.network.heads)
        if getattr(own, field) is not None and getattr(asked, field) == getattr(own, field):
            return True
        if field == "heads" and own.heads is None is asked.heads and own.takes_attention:
            return True
    return False


def _header(study: Study, settings: Settings) -> None:
    from atdiag.networks import teachers

    data = settings.profile.data
    epochs = sorted({spec.recipe.epochs for arm in study.arms for spec in arm.specs})
    typer.echo(f"atdiag {study.ablation}: {study.teacher.label}")
    typer.echo(
        f"profile {settings.profile.name}: {data.name}, {data.train:,} training images x "
        f"{' or '.join(map(str, epochs))} epochs, {_count(len(settings.seeds), 'seed')}"
    )
    if teachers.is_miniature(study.teacher):
        typer.echo(
            f"this teacher is a miniature of {teachers.row(study.teacher.name).title}'s architecture; "
            "the published one: --profile small, or paper"
        )
    if study.teacher.sha256 is None:
        typer.echo(f"its weights are not on this machine: {teachers.how_to_get(study.teacher)}")
    if settings.overrides:
        typer.echo("overrides: " + ", ".join(f"{name}={value}" for name, value in sorted(settings.overrides.items())))


def _check_weights(study: Study, store: Store) -> None:
    """Raise UserError where the file of a published teacher is here and is not what it should be.

    Loads it as a training process would, which takes seconds; a study whose runs are all finished does not need it.
    """
    from atdiag.networks import teachers, weights
    from atdiag.study import schedule

    if study.teacher.sha256 is None or teachers.is_miniature(study.teacher):
        return
    if any(spec.teacher for spec in schedule.pending(study.specs, store)):
        weights.load(study.teacher)


def _check_data(study: Study, store: Store) -> None:
    """Raise UserError, before anything is trained, where real images are not here or not what they should be.

    A study whose runs are all finished needs none.
    """
    from atdiag.data import names
    from atdiag.study import schedule

    todo = schedule.pending(study.specs, store)
    if sets := {spec.data: spec.network for spec in todo if names.is_real(spec.data.name)}:
        from atdiag.data import datasets

        for data, network in sets.items():
            datasets.check(data, network)


def _execute(study: Study, settings: Settings, store: Store, device: str) -> None:
    from atdiag.study import schedule

    specs = study.specs
    todo = schedule.pending(specs, store)
    threads = settings.profile.threads
    processes = min(schedule.processes_for(device, threads), max(len(todo), 1))
    if not todo:
        typer.echo(f"{_count(len(specs), 'run')}, all finished before: nothing to train")
        return
    cost = _duration(schedule.estimate(todo, processes, schedule.measured_speed(store, device)))
    begun = sum(store.run(spec).checkpoint.exists() for spec in todo)
    go_on = f" ({begun} go on from their checkpoints)" if begun else ""
    typer.echo(
        f"{_count(len(specs), 'run')}, {len(specs) - len(todo)} finished before; "
        f"{len(todo)} to do{go_on} in {_count(processes, 'process')} on {device}: about {cost}"
    )
    train(specs, store, device, threads)


def train(specs: list[RunSpec], store: Store, device: str, threads: int | None) -> None:
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
    said = ""
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, rate="")

        def tick(now: schedule.Tick) -> None:
            nonlocal said
            elapsed = bar.tasks[0].elapsed or 0
            rate = f"{now.images / elapsed:.0f} images/s" if now.images and elapsed else ""
            done = len(specs) - len(schedule.pending(specs, store))
            text = f"{done}/{len(specs)} runs" if now.total else now.doing
            bar.update(task, completed=now.done, total=now.total or None, rate=rate, description=text)
            if not console.is_terminal and text != said:
                said = text
                console.print(f"{text} {rate}".rstrip(), highlight=False)

        schedule.execute(specs, store, device, threads, tick)


def _write(report: Report, folder: Path) -> list[Path]:
    """Write table and figure; nothing of another experiment is touched."""
    from atdiag.runs import write_atomically
    from atdiag.study import tables

    folder.mkdir(parents=True, exist_ok=True)
    stem = tables.slug(report.study)
    paths = {kind: folder / f"{stem}.{kind}" for kind in ("csv", "md", "json", "png", "pdf")}
    write_atomically(paths["csv"], tables.frame(report).to_csv(index=False))
    write_atomically(paths["md"], tables.markdown(report))
    _draw(report, paths["png"], paths["pdf"])
    write_atomically(paths["json"], json.dumps(tables.as_json(report, list(paths.values())), indent=1))
    return list(paths.values())


def _draw(report: Report, *paths: Path) -> None:
    found = [entry for entry in entry_points(group="atdiag.figures") if entry.name == report.study.figure]
    if not found:
        raise ValueError(f"no figure named {report.study.figure!r} is installed")
    figure = found[0].load()(report)
    for path in paths:
        figure.savefig(path)


def _missing_data(settings: Settings) -> str | None:
    """What the real run would say of the data, in a plan; None where they are here."""
    from atdiag.data import names, places

    name = settings.profile.data.name
    return (
        f"{name} is not on this machine (see 'atdiag data')" if names.is_real(name) and not places.found(name) else None
    )


def _show_plan(study: Study, settings: Settings, store: Store, device: str, json_: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from atdiag.study import schedule

    _header(study, settings)
    speed = schedule.measured_speed(store, device)
    table = Table(title=f"{study.ablation}: what would be run", title_justify="left")
    for name in ("arm", "seed", "run", "state", "thread-s"):
        table.add_column(name, justify="right" if name in ("seed", "thread-s") else "left", no_wrap=name != "arm")
    arms = [*study.arms, *([study.reference] if study.reference else [])]
    for arm in arms:
        for spec in arm.specs:
            cost = f"{schedule.seconds(spec, speed):.0f}"
            table.add_row(arm.name, str(spec.seed.model), spec.id, store.run(spec).state, cost)
    Console().print(table)
    todo = schedule.pending(study.specs, store)
    processes = schedule.processes_for(device, settings.profile.threads)
    wall = schedule.estimate(todo, processes, speed)
    typer.echo(
        f"{_count(len(study.specs), 'run')}, {len(todo)} to do, about {_duration(wall)} in "
        f"{_count(processes, 'process')} on {device}."
    )
    for note in study.notes:
        typer.echo(f"- {note}")
    if study.teacher.sha256 is None:
        typer.echo("The names of runs that need the teacher will be others: its weights' sha256 is part of them.")
    scenes = {"test_per_source", "clutter"} if settings.profile.data.image_size else set()
    resolved = {"data": settings.profile.data.model_dump(mode="json", exclude=scenes)}
    form = settings.profile.transfer.model_dump(mode="json", exclude_defaults=True)
    resolved["transfer"] = form or {"layers": "all", "heads": "all", "tensor": "map"}
    trained = {spec.recipe for arm in study.arms for spec in arm.specs}
    for recipe in dict.fromkeys(settings.profile.recipe.values()):
        if recipe in trained:
            of = [method for method, one in settings.profile.recipe.items() if one == recipe]
            name = "recipe" if len(trained) == 1 else f"recipe of {', '.join(of)}"
            resolved[name] = recipe.model_dump(mode="json")
    networks = {spec.network: arm.name for arm in reversed(study.arms) for spec in arm.specs}
    resolved["student"] = study.arms[0].specs[0].network.model_dump(mode="json")
    for name, document in resolved.items():
        typer.echo(f"{name}: " + ", ".join(f"{k}={_short(v)}" for k, v in document.items() if v not in (None, [], ())))
    for network, name in sorted(networks.items(), key=lambda pair: len(pair[0].components)):
        typer.echo(f"network of {name}: {_size(network)}")
    if json_:
        plan = [
            {"arm": a.name, "run": s.id, "state": store.run(s).state, "spec": s.model_dump(mode="json")}
            for a in arms
            for s in a.specs
        ]
        typer.echo(json.dumps({"ablation": study.ablation, "seconds": round(wall), "runs": plan}))


def _size(network: Network) -> str:
    """``standard, 22.1 M parameters, 4.6 GFLOPs per image``."""
    from atdiag.networks import students

    parts = ", ".join(network.components) or "standard"
    parameters, flops = students.parameters(network), students.flops(network)
    return f"{parts}; {parameters / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOPs per image"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(number: int, what: str) -> str:
    """A number of things.

    >>> _count(1, "run"), _count(2, "process"), _count(1000, "seed")
    ('1 run', '2 processes', '1,000 seeds')
    """
    many = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else many}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} days"
