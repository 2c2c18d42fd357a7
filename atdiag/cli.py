"""The command line. Imports nothing heavy: every command imports its work when it is called."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from atdiag.runs import Run, Store
    from atdiag.spec import RunSpec, Transfer
    from atdiag.study.ablation import Lab, Report, Study
    from atdiag.study.profile import Settings

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

Runs = Annotated[
    Path | None, typer.Option("--runs", help="Where run directories live. [default: $ATDIAG_RUNS, else ./runs]")
]
Json = Annotated[bool, typer.Option("--json", help="Print a last line that a machine can read.")]


class _Commands(TyperGroup):
    """Commands in the order they are told, ablations from entry points first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Experiments first."""
        ours = [name for name in ("reinit", "layers", "rescue") if name in self.commands]
        return ours + [name for name in self.commands if name not in ours]


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Can this pre-trained teacher's attention be transferred to my ViT, and if not, what stands in the way?\n\n"
    "Everything runs at profile mini unless told otherwise: miniature teachers, embedded data, a CPU, minutes.",
)
runs_app = typer.Typer(no_args_is_help=True, help="List, show and remove runs.")


# --- experiments ---------------------------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {
    "profile": (str | None, typer.Option(help="The scale: mini, small or paper. [default: mini]"), None),
    "set_": (
        list[str],
        typer.Option("--set", metavar="NAME=VALUE", help="Override a setting, such as recipe.epochs=40. Repeatable."),
        [],
    ),
    "seeds": (int | None, typer.Option(help="How many seeds. [default: the profile's; mini: 3]"), None),
    "dry_run": (bool, typer.Option("--dry-run", help="Show what would be run, what is finished, and the cost."), False),
    "json_": (bool, typer.Option("--json", help="Print a last line that a machine can read."), False),
    "out": (
        Path | None,
        typer.Option(help="Folder for table and figure. [default: ./results/<ablation>-<teacher>-<profile>]"),
        None,
    ),
    "runs": (
        Path | None,
        typer.Option("--runs", help="Where run directories live. [default: $ATDIAG_RUNS, else ./runs]"),
        None,
    ),
    "device": (str | None, typer.Option(help="cuda, mps or cpu. [default: the profile's; mini: cpu]"), None),
}


def _add_ablations(target: typer.Typer) -> None:
    """A command for each installed ablation: its own options, then those that all experiments have."""
    for entry in entry_points(group="atdiag.ablations"):
        target.command(entry.name)(_experiment(entry.load()))


def _experiment(ablation: Callable[..., Study]) -> Callable[..., None]:
    signature = inspect.signature(ablation, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, option])
        for name, (type_, option, default) in _COMMON.items()
    ]

    def command(**options: Any) -> None:
        chosen = {p.name: options.pop(p.name) for p in own}
        _run_experiment(lambda lab: ablation(lab, **chosen), **options)

    command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *common)}
    command.__doc__ = ablation.__doc__
    command.__name__ = ablation.__name__
    return command


def _run_experiment(
    make: Callable[[Lab], Study],
    profile: str | None,
    set_: list[str],
    seeds: int | None,
    dry_run: bool,
    json_: bool,
    out: Path | None,
    runs: Path | None,
    device: str | None,
) -> None:
    from atdiag.runs import Store
    from atdiag.study import profile as profiles
    from atdiag.study import schedule, tables
    from atdiag.study.ablation import Lab, report

    settings = profiles.resolve(profile, seeds, set_, runs)
    device = schedule.choose_device(device or settings.profile.device)
    study = make(Lab(settings))
    store = Store(settings.runs)
    folder = tables.output_folder(study, settings.profile.name, out)
    tables.writable(settings.runs, "--runs")
    if dry_run:
        _show_plan(study, settings, store, device, json_)
        return
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


def _header(study: Study, settings: Settings) -> None:
    where = "a miniature of its architecture on embedded data; --profile paper is the real one"
    note = f" ({where})" if settings.profile.name == "mini" else ""
    typer.echo(f"atdiag {study.ablation}: {study.teacher.label}{note}")
    if settings.overrides:
        typer.echo("overrides: " + ", ".join(f"{name}={value}" for name, value in sorted(settings.overrides.items())))


def _execute(study: Study, settings: Settings, store: Store, device: str) -> None:
    from atdiag.study import schedule

    specs = study.specs
    todo = schedule.pending(specs, store)
    threads = settings.profile.threads
    processes = min(schedule.processes_for(device, threads), max(len(todo), 1))
    if not todo:
        typer.echo(f"{len(specs)} runs, all finished before: nothing to train")
        return
    cost = _duration(schedule.estimate(todo, processes, schedule.measured_speed(store, device)))
    what = "process" if processes == 1 else "processes"
    typer.echo(
        f"{len(specs)} runs, {len(specs) - len(todo)} finished before; "
        f"{len(todo)} to do in {processes} {what} on {device}: about {cost}"
    )
    _train(specs, store, device, threads)


def _train(specs: list[RunSpec], store: Store, device: str, threads: int | None) -> None:
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
    before = len(specs) - len(schedule.pending(specs, store))
    console = Console(stderr=True)
    said = ""
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, rate="")

        def tick(now: schedule.Tick) -> None:
            nonlocal said
            elapsed = bar.tasks[0].elapsed or 0
            rate = f"{now.images / elapsed:.0f} images/s" if now.images and elapsed else ""
            text = f"{before + now.finished_runs}/{len(specs)} runs" if now.total else now.doing
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
    typer.echo(f"{len(study.specs)} runs, {len(todo)} to do, about {_duration(wall)} in {processes} processes.")
    resolved = {"data": settings.profile.data.model_dump(mode="json")}
    recipes = {method: recipe.model_dump(mode="json") for method, recipe in settings.profile.recipe.items()}
    used = sorted({spec.transfer.method for arm in study.arms for spec in arm.specs})
    if len({json.dumps(recipes[m]) for m in used}) == 1:
        resolved["recipe"] = recipes[used[0]]
    else:
        resolved |= {f"recipe.{method}": recipes[method] for method in used}
    resolved["student"] = study.arms[0].specs[0].network.model_dump(mode="json")
    for name, document in resolved.items():
        typer.echo(f"{name}: " + ", ".join(f"{k}={_short(v)}" for k, v in document.items()))
    if json_:
        plan = [
            {"arm": a.name, "run": s.id, "state": store.run(s).state, "spec": s.model_dump(mode="json")}
            for a in arms
            for s in a.specs
        ]
        typer.echo(json.dumps({"ablation": study.ablation, "seconds": round(wall), "runs": plan}))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- teachers, runs, doctor ----------------------------------------------------------------------------------------


@app.command()
def teachers(
    profile: Annotated[str | None, typer.Option(help="The scale: mini, small or paper. [default: mini]")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    json_: Json = False,
) -> None:
    """List the teachers: weights and their licence, native components, tokens, and whether they are here now."""
    from atdiag.networks import listing

    rows = listing.rows(profile or "mini", family)
    if json_:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console

    console = Console()
    console.print(listing.table(rows, profile or "mini"))
    if others := listing.stand_ins(rows):
        console.print(
            "The same architecture at this size:", *(f"  {line}" for line in others), sep="\n", highlight=False
        )


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="The miniature to rebuild, such as clip_b.")],
    runs: Runs = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. [default: ./<name>.safetensors]")] = None,
    install: Annotated[bool, typer.Option("--install", help="Put it in the shipped one's place.")] = False,
) -> None:
    """Pre-train a miniature teacher again and compare its accuracy with the shipped one's."""
    from atdiag.networks import weights
    from atdiag.runs import Store
    from atdiag.study import pretraining, tables
    from atdiag.study import profile as profiles

    spec = pretraining.spec(name)
    path = weights.shipped_path(name) if install else out or Path(f"{name}.safetensors")
    tables.writable(path.parent, "--out")
    settings = profiles.resolve("mini", None, (), runs)
    store = Store(settings.runs)
    typer.echo(f"atdiag pretrain: {name} (mini), {spec.data.train} scenes x {spec.recipe.epochs} epochs, run {spec.id}")
    _train([spec], store, "cpu", 1)
    old = weights.metadata(weights.shipped_path(name))["top1"] if weights.shipped_path(name).exists() else None
    pretraining.export(store.run(spec), path)
    shipped = "none" if old is None else f"{old:.1f} %"
    typer.echo(f"top-1 {store.run(spec).result()['top1']:.1f} % (shipped: {shipped})\n  {path}")


@app.command()
def doctor(runs: Runs = None, json_: Json = False) -> None:
    """Check this machine: versions, device, disk, data, and that fused and explicit attention agree."""
    from rich.console import Console

    from atdiag.training import checkup

    findings = checkup.examine(runs or Path("runs"))
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]BAD[/red] "
        Console().print(f"{mark} {finding.what}: {finding.found}", highlight=False)
    if json_:
        typer.echo(json.dumps([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings]))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FAULT)


@runs_app.command("list")
def runs_list(runs: Runs = None, json_: Json = False) -> None:
    """List all runs, oldest first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = []
    store = _store(runs)
    for run in store.list():
        try:
            spec = run.spec
        except ValueError:  # no spec, another run's, or another version's: the others are listed all the same
            nothing = dict.fromkeys(("teacher", "student", "start", "transfer", "seed"), "")
            rows.append({"run": run.id, "state": "damaged", **nothing, "top1": None})
            continue
        rows.append(
            {
                "run": run.id,
                "state": run.state,
                "teacher": spec.teacher.label if spec.teacher else "",
                "student": "\n".join(spec.network.components) or "standard",
                "start": spec.init.source + (f" less {'+'.join(spec.init.reinit)}" if spec.init.reinit else ""),
                "transfer": _transfer_text(spec.transfer),
                "seed": f"{spec.seed.data}/{spec.seed.model}",
                "top1": run.result()["top1"] if run.finished else None,
            }
        )
    if json_:
        typer.echo(json.dumps(rows))
        return
    table = Table(title=f"{len(rows)} runs in {store.root}", title_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    for name in ("run", "state", "teacher", "student", "start", "transfer", "seed", "top1"):
        table.add_column(name, no_wrap=name not in ("teacher", "start", "transfer"))
    for row in rows:
        cells = [f"{v:.1f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()]
        table.add_row(*cells)
    Console().print(table)


def _transfer_text(transfer: Transfer) -> str:
    if transfer.method == "none":
        return "none"
    layers = transfer.layers
    contiguous = layers == tuple(range(layers[0], layers[-1] + 1))
    where = f"{layers[0]}-{layers[-1]}" if contiguous else ",".join(map(str, layers))
    return f"{transfer.method} {where}" + (f" x{transfer.weight:g}" if transfer.weight is not None else "")


def _store(runs: Path | None) -> Store:
    from atdiag.runs import Store
    from atdiag.study import profile as profiles

    return Store(profiles.resolve(None, None, (), runs).runs)


def _find(store: Store, name: str) -> Run:
    from atdiag.words import UserError, suggest

    try:
        return store.find(name)
    except KeyError as fault:
        raise UserError(f"{fault.args[0]}{suggest(name, [run.id for run in store.list()])}") from None


@runs_app.command("show")
def runs_show(run: Annotated[str, typer.Argument(help="A run's id, or its first digits.")], runs: Runs = None) -> None:
    """Show one run: what it is, where it stands, and what came out."""
    from atdiag.words import UserError

    found = _find(_store(runs), run)
    document: dict[str, Any] = {"run": found.id, "state": found.state}
    try:
        document["spec"] = found.spec.model_dump(mode="json")
    except ValueError:
        raise UserError(
            f"{found.path / 'spec.json'} can't be read, or is not this run's",
            f"'atdiag runs remove {found.id}' deletes it",
        ) from None
    document["metrics"] = found.progress()
    if found.finished:
        document["result"] = found.result()
    if failure := found.failure():
        document["failure"] = failure
    typer.echo(json.dumps(document, indent=1))


@runs_app.command("remove")
def runs_remove(
    run: Annotated[list[str], typer.Argument(help="Ids of runs, or their first digits.")], runs: Runs = None
) -> None:
    """Delete runs. Their numbers can then only be had by training again."""
    from atdiag.runs import RunBusyError
    from atdiag.words import UserError

    store = _store(runs)
    for one in [_find(store, name) for name in run]:  # all are found before any is removed
        try:
            store.remove(one)
        except RunBusyError as fault:
            raise UserError(str(fault), "wait until it ends") from None
        typer.echo(f"removed {one.id}")


# --- entry ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The console script. Wrong input: one line, exit 2. A fault at run time: one line, exit 1."""
    signal.signal(signal.SIGTERM, _terminate)
    code: Any
    try:
        _add_ablations(app)
        app.add_typer(runs_app, name="runs")
        code = app(args=arguments, prog_name="atdiag", standalone_mode=False) or 0  # Ctrl-C comes back as 130
    except SystemExit as asked:  # SIGTERM
        code = asked.code
    except Exception as fault:
        code = _explain(fault)
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _say("stopped: checkpoints are written, the same command goes on from there")
    sys.exit(code)


def _terminate(*_: Any) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _explain(fault: Exception) -> int:
    """Say what went wrong in one line, and give the exit code."""
    from atdiag.words import UserError

    if isinstance(fault, UserError):
        _say(str(fault))
        return EXIT_USAGE
    if hasattr(fault, "format_message"):  # a usage error of the command-line library
        if type(fault).__name__ == "NoArgsIsHelpError":
            typer.echo(fault.format_message(), err=True)
            return EXIT_USAGE
        context = getattr(fault, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        _say(fault.format_message().replace("\n", " ").rstrip(".") + hint)
        return EXIT_USAGE
    from atdiag.study.schedule import FaultError, StoppedError

    if isinstance(fault, StoppedError):
        return EXIT_TERMINATED
    if isinstance(fault, FaultError | OSError):
        _say(str(fault))
        return EXIT_FAULT
    if os.environ.get("ATDIAG_DEBUG"):
        raise fault
    _say(f"{type(fault).__name__}: {fault} (this is a bug in atdiag; ATDIAG_DEBUG=1 shows where)")
    return EXIT_FAULT


def _say(text: str) -> None:
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)


if __name__ == "__main__":
    main()
