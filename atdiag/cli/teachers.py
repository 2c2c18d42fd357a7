"""``atdiag teachers``: list teachers, download weights. ``atdiag pretrain``: rebuild a miniature.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from atdiag.cli import completing
from atdiag.cli.helping import App
from atdiag.cli.options import Json, Profile, Runs
from atdiag.core import paths
from atdiag.core.text import count

app = App()


@app.callback(invoke_without_command=True)
def teachers(
    context: typer.Context,
    profile: Profile = None,
    family: Annotated[str | None, typer.Option(help="Only this family.", autocompletion=completing.families)] = None,
    specimens: Annotated[
        bool, typer.Option("--specimens", help="The specimens instead: miniatures with a planted, known fault.")
    ] = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Instead: which of timm's ViTs can teach, and have native students.")
    ] = False,
    json_: Json = False,
) -> None:
    """List the teachers: weights, licences, native components.

    Also their tokens, and whether the weights are on this machine.
    """
    if context.invoked_subcommand is not None:
        return
    if coverage:
        _coverage(json_)
        return
    if specimens:
        _specimens(family, json_)
        return
    from atdiag.networks.registry import listing
    from atdiag.study.settings import profile_name

    name = profile_name(profile)
    rows = listing.rows(name, family)
    if json_:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console

    from atdiag.reports.console import show_table

    show_table(listing.table(rows, name))
    console = Console()
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


def _specimens(family: str | None, json_: bool) -> None:
    from atdiag.core.errors import UserError
    from atdiag.networks.registry import listing

    if family is not None:
        raise UserError(f"--family {family} with --specimens, which belong to no family", "leave one of them out")
    rows = listing.specimen_rows()
    if json_:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console

    console = Console()
    console.print(listing.specimen_table(rows))
    console.print(
        "--teacher NAME takes one in every experiment, at profile mini; --json says what was done.", highlight=False
    )


@app.command("pull")
def teachers_pull(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="Teachers, such as mocov3_s or timm:MODEL.", autocompletion=completing.teachers
        ),
    ],
) -> None:
    """Download published weights in advance, and check that they load."""
    from atdiag.networks.registry import teachers as registry
    from atdiag.networks.weights import pull

    for name in names:  # check all names before downloading any
        registry.source(name)
    for name in names:
        got = pull.pull(name)
        state = "was here" if got.was_here else "fetched"
        left = f", {got.dropped} keys beside it" if got.dropped else ""
        typer.echo(f"{name} {state}: {got.path}\n  sha256 {got.sha256}, {got.branch}{left}")


def _coverage(json_: bool) -> None:
    """Print what can be done with each of timm's ViTs; it takes a minute or two."""
    from atdiag.networks.timm import coverage

    found = list(coverage.survey())
    typer.echo(json.dumps([row._asdict() for row in found]) if json_ else "\n".join(coverage.lines(found)))


def pretrain(
    name: Annotated[
        str,
        typer.Argument(
            help="The miniature or specimen to rebuild, such as clip_b.", autocompletion=completing.miniatures
        ),
    ],
    objective: Annotated[
        str, typer.Option(help="supervised, or mae: a masked autoencoder, which sees no label (none ships).")
    ] = "supervised",
    scenes: Annotated[
        int | None, typer.Option(min=64, max=1_000_000, help="Fewer scenes, or more, than its recipe has.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Fewer epochs over them, as for a weaker teacher, or more.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Another seed, of its scenes and its initialisation.")
    ] = None,
    runs: Runs = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. [default: ./<name>.safetensors]")] = None,
    install: Annotated[bool, typer.Option("--install", help="Replace the shipped one.")] = False,
) -> None:
    """Pre-train a miniature again, and compare its accuracy.

    A miniature teacher or a specimen; the accuracy is compared with that of the shipped weights.
    """
    from atdiag.core.errors import UserError
    from atdiag.core.options import ExecutionOptions
    from atdiag.core.runs import Store
    from atdiag.execution.run import execute
    from atdiag.networks.registry.specimens import specimens
    from atdiag.networks.weights import loading
    from atdiag.reports import console
    from atdiag.study import settings as profiles
    from atdiag.training import pretraining

    spec = pretraining.spec(name, objective, scenes, epochs, seed)
    own = name if objective == "supervised" else f"{name}-{objective}"
    if install and own != name:
        raise UserError(f"the shipped {name} is supervised", "leave `install` or `objective` out")
    if install and spec != pretraining.spec(name, objective):
        raise UserError("the shipped miniatures share one recipe", "leave `install` out, or `scenes`, `epochs`, `seed`")
    path = loading.shipped_path(name) if install else out.expanduser() if out else Path(f"{own}.safetensors")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder", f"name a file in it, such as {path / name}.safetensors")
    paths.writable(path.parent, "out")
    settings = profiles.resolve("mini", None, (), runs)
    paths.fit_for_runs(settings.runs, "runs")
    store = Store(settings.runs)
    kind = "specimen" if name in specimens() else "mini"
    length = f"{count(spec.data.train, 'scene')} x {count(spec.recipe.epochs, 'epoch')}"
    typer.echo(f"atdiag pretrain: {name} ({kind}), {length}, run {spec.id}")
    options = ExecutionOptions(device="cpu", threads=1)
    with console.training(1, lambda: int(not store.run(spec).finished)) as report:
        execute([spec], store, options, report)
    shipped_here = own == name and loading.shipped_path(name).exists()
    old = loading.metadata(loading.shipped_path(name))["top1"] if shipped_here else None
    pretraining.export(store.run(spec), path)
    shipped = "none" if old is None else f"{old:.1f} %"
    measured = "top-1" if spec.masked is None else "linear probe"
    typer.echo(f"{measured} {store.run(spec).result()['top1']:.1f} % (shipped: {shipped})\n  {path}")
