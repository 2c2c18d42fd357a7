"""The command line. Imports nothing heavy: every command imports its work when it is called."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from atdiag import conduct, experiments, folders, inspection, probes, records, reproduction
from atdiag.experiments import say
from atdiag.options import DataDir, Json, Profile, Runs

EXIT_FAULT, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


OURS = (
    *("reinit", "layers", "rescue", "benchmark", "sizes", "epochs", "datasets", "ood", "losses", "match", "recipes"),
)
"""The papers' experiments, in the order in which they are told."""


class _Commands(TyperGroup):
    """Commands in the order they are told, ablations from entry points first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Experiments first: the papers' in their order, then others'; then everything else."""
        ours = [name for name in OURS if name in self.commands]
        others = [name for name in self.commands if name not in (*ours, *experiments.RESERVED)]
        return [*ours, *others, *(name for name in experiments.RESERVED if name in self.commands)]


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Can this pre-trained teacher's attention be transferred to my ViT, and if not, what stands in the way?\n\n"
    "Everything runs at profile mini unless told otherwise: miniature teachers, embedded data, a CPU, minutes.",
)
teachers_app = typer.Typer()
data_app = typer.Typer(help="List the data sets and where they are found; check one.")


@teachers_app.callback(invoke_without_command=True)
def teachers(
    context: typer.Context,
    profile: Profile = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    json_: Json = False,
) -> None:
    """List the teachers: weights and their licence, native components, tokens, and whether they are here now."""
    if context.invoked_subcommand is not None:
        return
    from atdiag.networks import listing
    from atdiag.study.profile import profile_name

    name = profile_name(profile)
    rows = listing.rows(name, family)
    if json_:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console

    console = Console()
    console.print(listing.table(rows, name))
    if others := listing.stand_ins(rows):
        console.print(
            "The same architecture at this size:", *(f"  {line}" for line in others), sep="\n", highlight=False
        )
    if name != "mini":
        console.print(
            "'atdiag teachers pull NAME' fetches weights; --json shows all that is known. Also: NAME@/path/file,",
            "timm:MODEL and timm:MODEL@/path/file for any softmax-attention ViT of timm.",
            sep="\n",
            highlight=False,
        )


@teachers_app.command("pull")
def teachers_pull(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Teachers, such as mocov3_s or timm:MODEL.")],
) -> None:
    """Fetch published weights ahead of time, and check that they load."""
    from atdiag.networks import pull
    from atdiag.networks import teachers as registry

    for name in names:  # all are known before any is fetched
        registry.source(name)
    for name in names:
        got = pull.pull(name)
        state = "was here" if got.was_here else "fetched"
        left = f", {got.dropped} keys beside it" if got.dropped else ""
        typer.echo(f"{name} {state}: {got.path}\n  sha256 {got.sha256}, {got.branch}{left}")


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
    from atdiag.study import pretraining
    from atdiag.study import profile as profiles
    from atdiag.words import UserError

    spec = pretraining.spec(name)
    path = weights.shipped_path(name) if install else out.expanduser() if out else Path(f"{name}.safetensors")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder", f"name a file in it, such as {path / name}.safetensors")
    folders.writable(path.parent, "--out")
    settings = profiles.resolve("mini", None, (), runs)
    folders.writable(settings.runs, "--runs")
    store = Store(settings.runs)
    typer.echo(f"atdiag pretrain: {name} (mini), {spec.data.train} scenes x {spec.recipe.epochs} epochs, run {spec.id}")
    conduct.train([spec], store, "cpu", 1)
    old = weights.metadata(weights.shipped_path(name))["top1"] if weights.shipped_path(name).exists() else None
    pretraining.export(store.run(spec), path)
    shipped = "none" if old is None else f"{old:.1f} %"
    typer.echo(f"top-1 {store.run(spec).result()['top1']:.1f} % (shipped: {shipped})\n  {path}")


@app.command()
def doctor(runs: Runs = None, json_: Json = False) -> None:
    """Check this machine: versions, device, disk, data, and that fused and explicit attention agree."""
    from rich.console import Console

    from atdiag.study import profile as profiles
    from atdiag.training import checkup

    findings = checkup.examine(profiles.resolve(None, None, (), runs).runs)
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]BAD[/red] "
        Console().print(f"{mark} {finding.what}: {finding.found}", highlight=False)
    if json_:
        typer.echo(json.dumps([{"what": f.what, "found": f.found, "ok": f.ok} for f in findings]))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FAULT)


@data_app.callback(invoke_without_command=True)
def data_list(context: typer.Context, data_dir: DataDir = None, json_: Json = False) -> None:
    """List the data sets: classes, images, licence, and where each is found."""
    if data_dir is not None:
        folders.look_in(data_dir)
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from atdiag.data import listing

    rows = listing.rows()
    if json_:
        typer.echo(json.dumps(rows))
    else:
        Console().print(listing.table(rows), highlight=False)
        for line in listing.where(rows):
            typer.echo(f"  {line}")
        Console().print(listing.others(), highlight=False)


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="A data set, such as cifar10, folder:PATH or timm:PATH.")],
    data_dir: DataDir = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch imagenette, cifar10 or cifar100 if it is not there.")
    ] = False,
    json_: Json = False,
) -> None:
    """Read every image of a data set: name broken ones, write hashes.

    Exit code 1 if an image is broken. The manifest, with the sha256 of each file, lies in the cache folder.
    """
    if data_dir is not None:
        folders.look_in(data_dir)
    from rich.console import Console
    from rich.progress import Progress

    from atdiag.data import datasets, listing, manifest
    from atdiag.data.names import is_real

    def progress() -> Progress:
        console = Console(stderr=True)
        return Progress(console=console, transient=True, disable=not console.is_terminal)

    if download:
        from atdiag.data.download import fetch

        with progress() as bar:
            task = bar.add_task("", total=None)
            place = fetch(
                name, lambda what, done, all_: bar.update(task, description=what, completed=done, total=all_ or None)
            )
        typer.echo(f"{name}: {'already there, nothing downloaded' if place is None else f'downloaded to {place}'}")
    if not is_real(name):
        typer.echo(f"{name}: embedded scenes, made anew for each data seed; there is no folder to check")
        return
    splits = datasets.check_files(name)
    with progress() as bar:
        task = bar.add_task(f"reading {name}", total=None)
        reading = manifest.read(splits, lambda done, total: bar.update(task, completed=done, total=total))
    for line in listing.text(reading):
        typer.echo(line)
    if json_:
        typer.echo(json.dumps(listing.document(reading)))
    if reading.broken:
        raise typer.Exit(EXIT_FAULT)


# --- entry ---------------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"atdiag {version('atdiag')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@functools.cache  # a process may call main again; every command is there once
def _complete(app: typer.Typer) -> None:
    """Add the commands that other modules hold, and those that other packages bring."""
    experiments.add_commands(app)
    reproduction.add_commands(app)
    inspection.add_commands(app)
    probes.add_commands(app)
    app.add_typer(teachers_app, name="teachers")
    app.add_typer(records.app, name="runs")
    app.add_typer(data_app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """The console script. Wrong input: one line, exit 2. A fault at run time: one line, exit 1."""
    signal.signal(signal.SIGTERM, _terminate)
    code: Any
    try:
        _complete(app)
        code = app(args=arguments, prog_name="atdiag", standalone_mode=False) or 0  # Ctrl-C comes back as 130
    except SystemExit as asked:  # SIGTERM
        code = asked.code
    except Exception as fault:
        code = _explain(fault)
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        say(experiments.stopped(next(iter(sys.argv[1:] if arguments is None else arguments), "")))
    sys.exit(code)


def _terminate(*_: Any) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _explain(fault: Exception) -> int:
    """Say what went wrong in one line, and give the exit code."""
    from atdiag.words import UserError

    if isinstance(fault, UserError):
        say(str(fault))
        return EXIT_USAGE
    if hasattr(fault, "format_message"):  # a usage error of the command-line library
        if type(fault).__name__ == "NoArgsIsHelpError":
            typer.echo(fault.format_message(), err=True)
            return EXIT_USAGE
        context = getattr(fault, "ctx", None)
        hint = f" (see '{context.command_path} --help')" if context else ""
        say(fault.format_message().replace("\n", " ").rstrip(".") + hint)
        return EXIT_USAGE
    from atdiag.runs import DamagedRunError
    from atdiag.study.schedule import FaultError, StoppedError

    if isinstance(fault, StoppedError):
        return EXIT_TERMINATED
    if isinstance(fault, FaultError | DamagedRunError | OSError):
        say(str(fault))
        return EXIT_FAULT
    if os.environ.get("ATDIAG_DEBUG"):
        raise fault
    say(f"{type(fault).__name__}: {fault} (this is a bug in atdiag; ATDIAG_DEBUG=1 shows where)")
    return EXIT_FAULT


if __name__ == "__main__":
    main()
