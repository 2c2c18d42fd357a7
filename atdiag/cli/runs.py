"""``atdiag runs``: list, show, compare, verify, export and remove trained runs.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli import completing
from atdiag.cli.helping import App
from atdiag.cli.messages import say
from atdiag.cli.options import Json, Runs
from atdiag.core import paths
from atdiag.core.text import count
from atdiag.reports import console, run_lines
from atdiag.reports.run_lines import STATES

if TYPE_CHECKING:
    from atdiag.core.runs import Store
    from atdiag.training.audit import Verdict

app = App(no_args_is_help=True, help="List, show, compare, verify, export and remove runs.")


@app.command("list")
def runs_list(
    runs: Runs = None,
    ablation: Annotated[
        str | None, typer.Option(help="Only runs of these experiments.", autocompletion=completing.experiments)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Only runs with these teachers; none: without.", autocompletion=completing.teachers),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help=f"Only runs in these states: {', '.join(STATES)}.", autocompletion=completing.choices(*STATES)
        ),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="All columns, and full ids.")] = False,
    json_: Json = False,
) -> None:
    """List runs, oldest first, one on each line.

    On a terminal long names are shortened to its width; a pipe gets them in full.
    """
    from atdiag.study.registry import installed

    store = store_of(runs)
    known = [*(one.name for one in installed()), "diagnose"]
    every = run_lines.rows(store, known)
    listed = run_lines.chosen(every, ablation, teacher, state, known)
    if json_:
        typer.echo(json.dumps(listed))
        return
    on_terminal = sys.stdout.isatty()
    if on_terminal or not listed:
        of = "" if len(listed) == len(every) else f" of {len(every):,}"
        typer.echo(f"{count(len(listed), 'run')}{of} in {store.root}")
    if listed:
        width = shutil.get_terminal_size().columns if on_terminal else None
        typer.echo("\n".join(run_lines.lines(listed, wide, width)))


def store_of(runs: Path | None) -> Store:
    """Return the store named by ``--runs``, the environment or a settings file.

    Raises UserError if ``--runs`` is not a folder: finding nothing there would look as if all were well.
    """
    from atdiag.core.errors import UserError
    from atdiag.core.runs import Store
    from atdiag.study import settings as profiles

    if runs is not None and not runs.expanduser().is_dir():
        raise UserError(f"--runs {runs} is not a folder", "give the folder that holds the runs")
    return Store(profiles.resolve(None, None, (), runs).runs)


@app.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="A run's id, or its first digits.", autocompletion=completing.runs)],
    runs: Runs = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything: spec, epochs, result, provenance.")] = False,
) -> None:
    """Show what one run is, and how it went."""
    from atdiag.core.errors import UserError

    store = store_of(runs)
    found = store.find(run)
    try:
        spec = found.spec.model_dump(mode="json")
    except ValueError:
        raise UserError(
            f"{found.path / 'spec.json'} can't be read, or is not this run's",
            f"'atdiag runs remove {found.id}' deletes it",
        ) from None
    if not json_:
        typer.echo("\n".join(run_lines.summary(found, store)))
        return
    document: dict[str, Any] = {"run": found.id, "state": found.state, "spec": spec, "metrics": found.progress()}
    if found.finished:
        document["result"] = found.result()
    if failure := found.failure():
        document["failure"] = failure
    typer.echo(json.dumps(document))


@app.command("remove")
def runs_remove(
    run: Annotated[
        list[str], typer.Argument(help="Ids of runs, or their first digits.", autocompletion=completing.runs)
    ],
    runs: Runs = None,
) -> None:
    """Delete runs.

    Getting their results back requires training again.
    """
    from atdiag.core.errors import UserError
    from atdiag.core.runs import RunBusyError

    store = store_of(runs)
    for one in [store.find(name) for name in run]:  # find all before removing any
        try:
            store.remove(one)
        except RunBusyError as fault:
            raise UserError(str(fault), "wait until it ends") from None
        typer.echo(f"removed {one.id}")


@app.command("verify")
def runs_verify(
    run: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of runs, or their first digits. [default: all]", autocompletion=completing.runs),
    ] = None,
    runs: Runs = None,
    json_: Json = False,
) -> None:
    """Hash the files of finished runs again, and name damage.

    Exit code 1 if anything is damaged. Also checks that spec, predictions, accuracy and teacher's weights are
    consistent.
    """
    from atdiag.training import audit

    store = store_of(runs)
    chosen = [store.find(name) for name in run] if run else store.list()
    with console.counted("hashing", len(chosen)) as report:
        verdicts = audit.verify(chosen, report)
    damaged = [verdict for verdict in verdicts if verdict.state == "damaged"]
    for verdict in damaged:
        typer.echo(str(verdict))
    typer.echo(f"{count(len(verdicts), 'run')} in {store.root}: {_tally(verdicts)}")
    if json_:
        rows = [
            {
                "run": verdict.run.id,
                "state": verdict.state,
                "faults": [{"file": str(path), "why": why} for path, why in verdict.faults],
                "mend": verdict.remedy,
            }
            for verdict in verdicts
        ]
        typer.echo(json.dumps(rows))
    if damaged:
        raise typer.Exit(1)


def _tally(verdicts: list[Verdict]) -> str:
    """Summarise verdicts: ``3 sound, 1 damaged, 1 not verifiable (older version: no hashes recorded)``."""
    notes = {
        "sound": "",
        "damaged": "",
        "not verifiable": " (finished by an older version, which recorded no hashes)",
        "unfinished": "",
    }
    states = [verdict.state for verdict in verdicts]
    parts = [f"{states.count(state)} {state}{note}" for state, note in notes.items() if state in states]
    if away := sum(verdict.teacher_here is False for verdict in verdicts):
        parts.append(f"the teacher's weights of {away} are not on this machine")
    return ", ".join(parts) or "nothing to look at"


@app.command("diff")
def runs_diff(
    a: Annotated[str, typer.Argument(help="A run's id, or its first digits.", autocompletion=completing.runs)],
    b: Annotated[str, typer.Argument(help="Another's.", autocompletion=completing.runs)],
    runs: Runs = None,
    json_: Json = False,
) -> None:
    """Show how two runs differ.

    Specs first, then environments, then results.
    """
    from rich.table import Table

    from atdiag.core.errors import UserError
    from atdiag.reports import run_table

    store = store_of(runs)
    one, other = store.find(a), store.find(b)
    if one.id == other.id:
        raise UserError(f"{a} and {b} are the same run, {one.id}", "name two; 'atdiag runs list' shows them")
    found = run_table.differences(one, other)
    if json_:
        typer.echo(json.dumps({"runs": [one.id, other.id], **found}))
        return
    from rich import box
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", f"{one.id[:12]} ({one.state})", f"{other.id[:12]} ({other.state})"):
        table.add_column(name, overflow="fold", no_wrap=not name)
    for title, rows in found.items():
        table.add_section()
        table.add_row(Text(title, style="bold"), *([] if rows else ["no difference"]))
        for name, *values in rows:
            table.add_row(f"  {name}", *("" if v is None else _shown(v) for v in values))
    console.show_table(table, highlight=False)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@app.command("export")
def runs_export(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write. [default: the terminal]")] = None,
    runs: Runs = None,
) -> None:
    """Write all runs as one CSV.

    Specs, states, results, environments. Unreadable runs are included with the state damaged; 'atdiag runs verify'
    examines them.
    """
    from atdiag.core.errors import UserError
    from atdiag.core.runs import write_atomically
    from atdiag.reports import run_table

    if out is not None:
        out = out.expanduser()
        if out.is_dir():
            raise UserError(f"-o {out} is a folder", f"name a file in it, such as {out / 'runs.csv'}")
        if not out.parent.is_dir():
            raise UserError(f"-o {out}: there is no folder {out.parent}")
        paths.writable(out.parent, "out")
    store = store_of(runs)
    rows = [run_table.row(one) for one in store.list()]
    text = run_table.to_csv(rows)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(out, text)
        typer.echo(f"{count(len(rows), 'run')}\n  {out}")
    if damaged := sum(row["state"] == "damaged" for row in rows):
        say(f"{count(damaged, 'run')} can't be read: 'atdiag runs verify' says why")


@app.command("export-model")
def runs_export_model(
    run: Annotated[str, typer.Argument(help="A run's id, or its first digits.", autocompletion=completing.runs)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder, new or empty.")],
    experiment: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The .json of its experiment, for the contrast in the card.")
    ] = None,
    runs: Runs = None,
    json_: Json = False,
) -> None:
    """Write a trained student with a model card, for timm.

    timm.create_model("local-dir:DIR", pretrained=True) loads it. Where timm has no class of the same function (a
    student that copies needs its teacher), a small loader comes along.
    """
    from atdiag.api.exporting import export_model

    files = export_model(store_of(runs).find(run), out, experiment)
    console.show_files(files)
    if json_:
        typer.echo(json.dumps({"files": [str(path) for path in files], "timm": files[0].name == "model.safetensors"}))
