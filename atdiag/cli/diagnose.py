"""``atdiag diagnose``: from a teacher to a cause and a remedy.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.api import diagnosing
from atdiag.api.diagnosing import Asked, PreparedDiagnosis
from atdiag.cli import planning
from atdiag.cli.messages import as_typed
from atdiag.cli.options import EXPERIMENT, SINGLE, joined
from atdiag.core.text import count, duration
from atdiag.diagnosis.hypotheses import MARGIN
from atdiag.reports import console

if TYPE_CHECKING:
    from atdiag.core.spec import RunSpec
    from atdiag.diagnosis.words import Advice, Said

_Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="A teacher, as every experiment takes it.")]
_Transfer = Annotated[str, typer.Option(help="The transfer that is diagnosed: copy or distill.")]
_Looks = Annotated[
    str, typer.Option(metavar="SEEDS", help="Seeds of every arm at the planned looks: at most three numbers.")
]
_Open = Annotated[bool, typer.Option("--open", help="Show the report in a browser at the end.")]
_Margin = Annotated[float, typer.Option(help="Points within which an effect counts as none.")]


def add_commands(app: typer.Typer) -> None:
    """Add the command, with the options of the experiments but for the number of seeds, which looks decide."""
    common = {**EXPERIMENT, **SINGLE}
    common = {name: option for name, option in common.items() if name not in ("seeds", "equivalence")}
    common |= {"open_": (_Open, False)}
    app.command("diagnose")(joined(diagnose, common, _diagnose))


def diagnose(
    _: object,
    teacher: _Teacher,
    transfer: _Transfer = "copy",
    looks: _Looks = diagnosing.SEEDS,
    margin: _Margin = MARGIN,
) -> Asked:
    """Tell whether this attention transfers, and if not, why.

    Writes a plan, asks the other experiments' arms in an order, with one error rate over all questions and looks, and
    stops when the answer is known. Ends with a verdict and what to change. Runs are shared with the experiments,
    and finished ones never trained again.
    """
    return Asked(teacher, transfer, looks, margin)


def _diagnose(
    make: partial[Asked], dry_run: bool, json_: bool, open_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:
    asked = make(None)
    ready = diagnosing.prepare(asked, set_, **given)
    folder = out.expanduser() if out else ready.folder
    if dry_run:
        _show(ready)
        if json_:
            typer.echo(json.dumps(ready.plan.document()))
        return
    diagnosing.check(ready, folder)
    where = ready.plan.write(folder)
    _show(ready)
    typer.echo(f"the plan: {where}")
    seen = diagnosing.look(ready, partial(_train, ready))
    for fact in seen.facts:
        typer.echo(f"seen before training: {fact}")
    for sign in seen.signs:
        typer.echo(f"seen before training, to be tested: {sign.text}")
    typed = partial(_typed, teacher=PurePath(asked.teacher).name)  # a report tells no path of this machine
    result, said = diagnosing.answer(ready, seen, partial(_train, ready), folder, typed, as_typed)
    _tell(said, asked.teacher)
    assert result.written is not None
    console.show_files([where, *result.written.files])
    if json_:
        typer.echo(json.dumps({**result.document, **result.written.record()}))
    if open_ and typer.launch(str(folder / "report.html")):
        typer.echo(f"no browser was found: open {folder / 'report.html'}", err=True)


def _show(ready: PreparedDiagnosis) -> None:
    """Print what will be asked, and what it costs."""
    plan, outline = ready.plan, ready.case.outline
    settings = ready.case.lab.settings
    most = replace(ready.session, settings=replace(settings, seeds=settings.seeds[: plan.looks[-1].seeds]))
    planning.header(replace(ready.series, ablation="diagnose"), most)
    looks = ", ".join(f"{look.seeds} seeds ({100 * look.level:.2g} %)" for look in plan.looks)
    fewer = ", as few as the budget asks for" if [look.seeds for look in plan.looks] != ready.asked.seeds else ""
    typer.echo(f"looks: {looks}{fewer}; margin {ready.case.margin:g} points")
    typer.echo(f"if it does not help, asked: {'; '.join(one.name for some in outline.families for one in some)}")
    for what, why in outline.not_asked.items():
        typer.echo(f"not asked: {what} ({as_typed(why)})")
    typer.echo(
        f"does it transfer: {count(len(plan.todo), 'run')} to do, about {duration(plan.seconds)}; "
        f"every question at every look: at most {duration(plan.most)}"
    )


def _train(ready: PreparedDiagnosis, specs: Sequence[RunSpec]) -> None:
    plan = ready.session.plan(specs)
    if plan.todo:
        planning.announce(plan, ready.session)
        diagnosing.train(ready, specs)


def _tell(said: Said, teacher: str) -> None:
    """Print the verdict on one screen."""
    from rich.console import Console

    terminal = Console()
    console.show_verdict(said.headline)
    width = max(len(what) for what, _ in said.numbers)
    for what, number in said.numbers:
        typer.echo(f"  {what:{width}}  {number}")
    typer.echo("")
    for one in said.advice:
        terminal.print(f"- {_typed(one, teacher)}", highlight=False, markup=False)
    for line in said.others:
        terminal.print(f"- {as_typed(line)}", style="dim", highlight=False, markup=False)


def _typed(advice: Advice, teacher: str) -> str:
    """Return an advice with the line to type."""
    if not advice.experiment:
        return advice.text
    words = ["atdiag", advice.experiment]
    words += [shlex.quote(teacher)] if advice.experiment == "diagnose" else ["--teacher", shlex.quote(teacher)]
    for name, value in advice.options.items():
        words += ["--set", f"{name}={value}"] if "." in name else [f"--{name}", value]
    return f"{advice.text} {' '.join(words)}"
