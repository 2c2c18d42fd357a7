"""``atdiag diagnose``: from a teacher to a cause and a remedy.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli import experiments, planning
from atdiag.cli.messages import as_typed
from atdiag.cli.options import EXPERIMENT, joined
from atdiag.cli.session import ExperimentSession, open_session
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.text import count, duration
from atdiag.reports import console
from atdiag.study.builder import Lab  # light: every ablation imports it

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.core.spec import RunSpec
    from atdiag.diagnosis.first_look import Sign
    from atdiag.diagnosis.planning import AnalysisPlan
    from atdiag.diagnosis.words import Advice, Said

_Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="A teacher, as every experiment takes it.")]
_Transfer = Annotated[str, typer.Option(help="The transfer that is diagnosed: copy or distill.")]
_Looks = Annotated[
    str, typer.Option(metavar="SEEDS", help="Seeds of every arm at the planned looks: at most three numbers.")
]
_Margin = Annotated[float, typer.Option(help="Points within which an effect counts as none.")]


@dataclass(frozen=True)
class Asked:
    """The options of the command, as typed."""

    teacher: str
    transfer: str
    looks: str
    margin: float

    def plan(self, session: ExperimentSession) -> AnalysisPlan:
        """Plan the diagnosis. Raises UserError for any option that makes no sense."""
        from atdiag.diagnosis import arms, planning

        seeds = _numbers(self.looks)
        lab = planning.lab(session.settings, seeds)
        case = arms.case(lab, self.teacher, self.transfer, self.margin)
        return planning.make(case, session.store, session.options, seeds)


def add_commands(app: typer.Typer) -> None:
    """Add the command, with the options of the experiments but for the number of seeds, which looks decide."""
    common = {name: option for name, option in EXPERIMENT.items() if name not in ("seeds", "equivalence")}
    app.command("diagnose")(joined(diagnose, common, _diagnose))


def diagnose(
    _: object,
    teacher: _Teacher,
    transfer: _Transfer = "copy",
    looks: _Looks = "5,8,12",
    margin: _Margin = 4.0,
) -> Asked:
    """Will this attention transfer, if not why, and what do I change? A plan, shared runs, and a verdict.

    Asks the other experiments' arms in an order, with one error rate over all questions and looks, and stops when
    the answer is known. Runs are shared with the experiments, and finished ones never trained again.
    """
    return Asked(teacher, transfer, looks, margin)


def _numbers(text: str) -> list[int]:
    from atdiag.stats.contrasts import FEWEST_SEEDS
    from atdiag.stats.sequential import looks

    try:
        numbers = [int(part) for part in text.split(",")]
        looks(numbers)
    except ValueError:
        raise UserError(
            f"`looks` {text!r} is not a list of at most three increasing numbers of seeds", "write it as 5,8,12"
        ) from None
    if numbers[-1] < FEWEST_SEEDS:
        raise UserError(f"`looks` {text} ends below {FEWEST_SEEDS} seeds, where verdicts begin", "write it as 5,8,12")
    return numbers


def _diagnose(
    make: partial[Asked], dry_run: bool, json_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:
    from atdiag.diagnosis import asking, document, html, words
    from atdiag.diagnosis.arms import Runs
    from atdiag.diagnosis.planning import arms
    from atdiag.reports import drawing, writers
    from figures import diagnosis as figures

    session = open_session(set_=set_, seeds=None, equivalence=None, **given)
    plan = make(None).plan(session)
    case, name = plan.case, plan.case.teacher.name
    every = [spec for arm in arms(case) for spec in case.arm(arm).specs]

    def planned(lab: Lab) -> list[RunSpec]:
        other = type(case)(lab, case.teacher, case.transfer, case.margin)
        return [spec for arm in arms(other) for spec in other.arm(arm).specs]

    experiments.check_overrides(planned, every, case.lab.settings, set_)
    folder = out.expanduser() if out else Path("results") / f"diagnose-{_plain(name)}-{plan.stem}"
    _show(plan, session)
    if dry_run:
        if json_:
            typer.echo(json.dumps(plan.document()))
        return
    paths.writable(folder, "out")
    experiments.check(_studies(case), session.plan(plan.todo), session)
    typer.echo(f"the plan: {plan.write(folder)}")
    signs = _first_look(plan, session)
    runs = Runs(case, session.store, partial(_train, session))
    found = asking.ask(case.outline, plan.looks, runs.answers, runs.footing, runs.teacher())
    said = words.say(plan, found)
    _tell(said, name)
    content = document.as_json(plan, found, said, runs, signs)

    def draw() -> Figure:
        title = f"diagnose, {case.teacher.label}, {case.transfer}, {count(found.last.look.seeds, 'seed')}"
        return figures.diagnosis(title, document.rows(plan, found), case.margin)

    with drawing.defaults():
        page = html.page(
            content, said, draw(), partial(_typed, teacher=PurePath(name).name), as_typed
        )  # no path of here
    written = writers.write(folder, "report", {"html": page}, content, {"": draw})
    console.show_files([folder / "plan.json", *written.files])
    if json_:
        typer.echo(json.dumps({**content, **written.record()}))


def _studies(case: Any) -> list[Any]:
    """Return the experiment whose arms are asked for first, for its checks of images and weights."""
    from ablations.benchmark import benchmark
    from atdiag.study.protocol import Series

    return [Series.join([benchmark(case.lab, case.teacher.name, "copy,distill")])]


def _plain(name: str) -> str:
    from atdiag.reports.document import plain

    return plain(name)


def _show(plan: AnalysisPlan, session: ExperimentSession) -> None:
    """Print what will be asked, and what it costs."""
    case, outline = plan.case, plan.case.outline
    typer.echo(f"atdiag diagnose: {case.teacher.label}, {case.transfer}")
    studies = [study for series in _studies(case) for study in series.studies]
    planning.scale(tuple(studies), session.settings)
    looks = ", ".join(f"{look.seeds} seeds ({100 * look.level:.2g} %)" for look in plan.looks)
    typer.echo(f"looks: {looks}; margin {plan.case.margin:g} points")
    typer.echo(f"if it does not help, asked: {'; '.join(one.name for some in outline.families for one in some)}")
    for what, why in outline.not_asked.items():
        typer.echo(f"not asked: {what} ({as_typed(why)})")
    typer.echo(
        f"does it transfer: {count(len(plan.todo), 'run')} to do, about {duration(plan.seconds)}; "
        f"every question at every look: at most {duration(plan.most)}"
    )


def _first_look(plan: AnalysisPlan, session: ExperimentSession) -> list[Sign]:
    """Print signs of known trouble in the teacher's attention, and return them."""
    from atdiag.analysis import images, statistics, subjects
    from atdiag.diagnosis import first_look

    data = session.settings.profile.data
    teacher = subjects.find(plan.case.teacher.name, session.settings.profile.name, data)
    (found,) = statistics.attention_stats([teacher], images.choose(first_look.IMAGES, data, teacher.network))
    signs = first_look.signs(found)
    for sign in signs:
        typer.echo(f"seen before training (to be tested): {sign.text}")
    return signs


def _train(session: ExperimentSession, specs: Sequence[RunSpec]) -> None:
    from atdiag.execution.plan import pending
    from atdiag.execution.run import execute

    if not pending(specs, session.store):
        return
    plan = session.plan(specs)
    planning.announce(plan, session.store)
    with console.training(len(plan.specs), lambda: experiments.unfinished(plan, session.store)) as report:
        execute(plan.specs, session.store, session.options, report)


def _tell(said: Said, teacher: str) -> None:
    """Print the verdict on one screen."""
    from rich.console import Console
    from rich.markup import escape

    terminal = Console()
    terminal.print(f"\n[bold]Verdict[/bold]  {escape(said.headline)}\n", highlight=False)
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
