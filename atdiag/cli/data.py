"""``atdiag data``: list the data sets, check one, download one.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from atdiag.cli import completing
from atdiag.cli.helping import App
from atdiag.cli.options import DataDir, Json
from atdiag.cli.session import resolve
from atdiag.core.progress import Progress
from atdiag.reports import console

app = App(help="List the data sets and where they are found; check one.")


@app.callback(invoke_without_command=True)
def data_list(context: typer.Context, data_dir: DataDir = None, json_: Json = False) -> None:
    """List the data sets: classes, images, licence, and where each is found."""
    resolve(data_dir, training=False)
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from atdiag.data import listing

    rows = listing.rows()
    if json_:
        typer.echo(json.dumps(rows))
    else:
        console.show_table(listing.table(rows), highlight=False)
        for line in listing.where(rows):
            typer.echo(f"  {line}")
        Console().print(listing.others(), highlight=False)


@app.command("check")
def data_check(
    name: Annotated[
        str,
        typer.Argument(
            help="A data set, such as cifar10, folder:PATH or timm:PATH.", autocompletion=completing.data_sets
        ),
    ],
    data_dir: DataDir = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch imagenette, cifar10 or cifar100 if it is not there.")
    ] = False,
    json_: Json = False,
) -> None:
    """Read every image of a data set: name broken ones, write hashes.

    Exit code 1 if an image is broken. The manifest, with the sha256 of each file, is stored in the cache folder.
    """
    resolve(data_dir, training=False)
    from atdiag.data import listing, manifest, sources

    if download:
        from atdiag.data.download import fetch

        with console.staged() as report:
            place = fetch(name, lambda what, done, total: report(Progress(done, total, doing=what)))
        typer.echo(f"{name}: {'already there, nothing downloaded' if place is None else f'downloaded to {place}'}")
    splits = sources.find(name).files()
    if splits is None:
        typer.echo(f"{name}: embedded, made anew for each data seed; there is no folder to check")
        return
    with console.counted(f"reading {name}") as report:
        reading = manifest.read(splits, report)
    for line in listing.text(reading):
        typer.echo(line)
    if json_:
        typer.echo(json.dumps(listing.document(reading)))
    if reading.broken:
        raise typer.Exit(1)
