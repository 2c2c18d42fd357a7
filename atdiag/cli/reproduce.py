"""``atdiag reproduce``: all analyses as one set of runs, with a table of claims. ``atdiag figures``: finished ones.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli import completing, experiments, planning
from atdiag.cli.messages import as_typed
from atdiag.cli.options import EXECUTION, EXPERIMENT, FLEET, joined
from atdiag.cli.session import ExperimentSession, open_session
from atdiag.core import paths, text
from atdiag.core.text import count
from atdiag.reports import console
from atdiag.study import registry
from atdiag.study.builder import Lab  # light: every ablation imports it
from atdiag.study.protocol import LEFT_OUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atdiag.core.errors import UserError
    from atdiag.core.runs import Store
    from atdiag.core.spec import RunSpec
    from atdiag.execution.plan import Plan
    from atdiag.reports.writers import Written
    from atdiag.study.claims import Judged
    from atdiag.study.protocol import Reading, Series

PAPERS = {"2024": "Li et al. 2024", "2026": "Qin et al. 2026"}

_Paper = Annotated[str, typer.Option("--paper", help="Whose analyses: 2024 (Li et al.), 2026 (Qin et al.), or all.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Fewer teachers, fewer variants of each analysis.")]


@dataclass(frozen=True)
class Analyses:
    """The analyses that are possible at a profile, and why the others are not."""

    series: dict[str, Series]
    refused: dict[str, UserError]
    papers: tuple[str, ...] = ()
    """The papers whose analyses they are."""

    @property
    def specs(self) -> list[RunSpec]:
        """All runs, each once."""
        return list({spec.id: spec for series in self.series.values() for spec in series.specs}.values())


def add_commands(app: typer.Typer) -> None:
    """Add both commands, with the options of the experiments."""
    app.command("reproduce")(joined(reproduce, EXPERIMENT, _reproduce))
    training = {*EXECUTION, *FLEET, "dry_run"} - {"data_dir"}
    common = {name: option for name, option in EXPERIMENT.items() if name not in training}
    app.command("figures")(joined(figures, common, _figures))


def reproduce(lab: Lab, paper: _Paper = "2026", quick: _Quick = False) -> Analyses:
    """Run all analyses of a paper and judge its claims.

    Runs shared by several analyses are trained once, and finished runs never again. After an interruption, the same
    command resumes.
    """
    from atdiag.core.selection import choose

    papers = {*PAPERS} if choose(paper, ("all", *PAPERS), "paper") == "all" else {paper}
    placed = {name: one for name, one in registry.placed().items() if papers & {*one[1].papers}}
    return replace(_made(lab, quick, placed), papers=tuple(sorted(papers)))


def figures(
    lab: Lab,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...", help="Analyses, such as benchmark; or all.", autocompletion=completing.analyses
        ),
    ],
    quick: _Quick = False,
) -> tuple[Analyses, list[str]]:
    """Draw figures and write tables of finished analyses.

    Trains nothing.
    """
    from atdiag.core.errors import UserError, suggest

    placed = registry.placed()
    known = ("all", *placed)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown analysis {unknown[0]!r}{suggest(unknown[0], known)}", f"known: {', '.join(known)}")
    chosen = placed if "all" in names else {name: placed[name] for name in names}
    return _made(lab, quick, chosen), names


def _made(lab: Lab, quick: bool, ablations: Mapping[str, tuple[Any, registry.Placement]]) -> Analyses:
    from ablations.reproduction import combinations
    from atdiag.core.errors import UserError
    from atdiag.study.protocol import Series

    series: dict[str, Series] = {}
    refused: dict[str, UserError] = {}
    for name, (ablation, placement) in ablations.items():
        options = placement.options(lab.settings.profile.name, quick)
        try:
            parts = [
                experiments.spread(partial(ablation, **one), lab, leave_out=True, spoken=as_typed)
                for one in combinations(options)
            ]
        except UserError as fault:
            refused[name] = UserError(as_typed(str(fault)))
        else:
            series[name] = Series.join(parts)
    return Analyses(series, refused)


def _reproduce(
    make: partial[Analyses], dry_run: bool, json_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:

    session = open_session(set_=set_, **given)
    analyses = make(Lab(session.settings))
    if not analyses.series:
        raise next(iter(analyses.refused.values()))
    experiments.check_overrides(lambda lab: make(lab).specs, analyses.specs, session.settings, set_)
    experiments.check_classes(list(analyses.series.values()), session.settings)
    only = "" if analyses.papers == ("2026",) else f"-{'-'.join(analyses.papers)}"
    folder = _folder(f"reproduce{only}", session, out)
    plan, every = session.plan(analyses.specs), list(analyses.series.values())
    if not dry_run:
        experiments.check(every, plan, session)
    _show(analyses, plan, session)
    if dry_run:
        if json_:
            typer.echo(json.dumps(_as_json(analyses, session.store)))
        return
    begun = time.monotonic()
    experiments.train(every, plan, session)
    readings = {name: session.reading(series) for name, series in analyses.series.items()}
    files = [*_write_all(readings, folder).files]
    judged = [*_judged(readings), *_untestable(analyses)]
    if "2024" in analyses.papers:
        costs, of_costs = _cost(session, folder / "cost")
        judged, files = [*judged, *costs], [*files, *of_costs.files]
    summary = _write_summary(judged, readings, folder)
    _tell(judged, session)
    typer.echo(f"{text.duration(time.monotonic() - begun)} in all\n")
    console.show_files([path for path in (*files, *summary.files) if path.suffix in (".md", ".png")])
    if json_:
        typer.echo(json.dumps(json.loads((folder / "summary.json").read_text())))


def _figures(
    make: partial[tuple[Analyses, list[str]]], json_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:
    from atdiag.core.errors import UserError
    from atdiag.execution.plan import pending
    from atdiag.study.pipeline import unmeasured

    session = open_session(set_=set_, **given)
    analyses, wanted = make(Lab(session.settings))
    experiments.check_classes(list(analyses.series.values()), session.settings)
    folder = _folder("figures", session, out)
    readings: dict[str, Reading] = {}
    left: list[str] = [f"{name}: {fault}" for name, fault in analyses.refused.items()]
    for name, series in analyses.series.items():
        missing = len(pending(series.specs, session.store)) or len(unmeasured([series], session.store))
        if missing:
            left.append(f"{name}: {count(missing, 'run')} of {len(series.specs)} not finished or not measured")
        else:
            readings[name] = session.reading(series)
    if not readings or (left and "all" not in wanted):
        raise UserError("; ".join(left), "the same line with 'reproduce' for 'figures NAME' trains them")
    written = _write_all(readings, folder)
    console.show_files([path for path in written.files if path.suffix in (".png", ".pdf", ".txt")])
    for line in left:
        typer.echo(f"not drawn: {line}")
    if json_:
        typer.echo(json.dumps({**written.record(), "left": left}))


def _folder(name: str, session: ExperimentSession, out: Path | None) -> Path:
    folder = out.expanduser() if out else Path("results") / f"{name}-{session.settings.profile.name}"
    paths.writable(folder, "out")
    return folder


def _cost(session: ExperimentSession, folder: Path) -> tuple[list[Judged], Written]:
    """Measure what transfer costs on this machine, each time anew, write it, and judge the claim.

    Where a cluster trains, this machine is none that trains: nothing is measured.
    """
    from ablations.cost import findings, planned
    from atdiag.cli import cost

    options = session.options
    repeats = 0 if session.on_cluster else None
    taken, told = cost.taken(planned(Lab(session.settings)), options.device, options.threads, repeats)
    for note in told:
        typer.echo(f"cost: {note}")
    judged = findings(taken)
    return judged, cost.write(taken, judged, folder)


def _show(analyses: Analyses, plan: Plan, session: ExperimentSession) -> None:
    """Print the plan: for each analysis its runs, those that no earlier one shares, and their estimated time."""
    from rich import box
    from rich.table import Table

    from atdiag.execution import cost
    from atdiag.study.pipeline import unmeasured

    table = Table(title="reproduce: all analyses as one set of runs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("analysis")
    for name in ("studies", "runs", "of its own", "to do", "thread time"):
        table.add_column(name, justify="right")
    typer.echo(f"atdiag reproduce: the analyses of {text.listed(PAPERS[paper] for paper in analyses.papers)}")
    planning.scale(tuple(study for series in analyses.series.values() for study in series.studies), session.settings)
    open_ = {spec.id for spec in plan.todo}
    seen: set[str] = set()
    for name, series in analyses.series.items():
        own = [spec for spec in series.specs if spec.id not in seen]
        seen |= {spec.id for spec in own}
        todo = [spec for spec in own if spec.id in open_]
        time_ = text.duration(sum(cost.seconds(spec, plan.speed) for spec in todo)) if todo else ""
        cells = (len(series.studies), len(series.specs), len(own), len(todo), time_)
        table.add_row(name, *map(str, cells))
    console.show_table(table)
    for name, fault in analyses.refused.items():
        typer.echo(f"- {name} is not testable here: {fault}")
    for note in dict.fromkeys(note for series in analyses.series.values() for note in series.notes):
        if note.startswith(LEFT_OUT):
            typer.echo(f"- {note}")
    measured = unmeasured(list(analyses.series.values()), session.store)
    wall = plan.seconds + sum(cost.testing_seconds(spec, plan.speed) for spec in measured)
    then = f", {count(len(measured), 'measurement')} of finished runs" if measured else ""
    typer.echo(
        f"{count(len(plan.specs), 'run')}, {len(plan.todo)} to do{then}: about {text.duration(wall)} in "
        f"{count(plan.processes, 'process')} on {plan.device}."
    )
    if "2024" in analyses.papers and not session.on_cluster:
        typer.echo("Then cost: activations, and a step's time and memory, measured on this machine each time.")


def _as_json(analyses: Analyses, store: Store) -> dict[str, Any]:
    return {
        name: [{"run": spec.id, "state": store.run(spec).state} for spec in series.specs]
        for name, series in analyses.series.items()
    }


def _write_all(readings: dict[str, Reading], folder: Path) -> Written:
    from atdiag.reports import writers

    every = [writers.write_reading(reading, folder / name) for name, reading in readings.items()]
    missing = {path: why for one in every for path, why in one.missing.items()}
    return writers.Written([path for one in every for path in one.files], missing)


def _judged(readings: dict[str, Reading]) -> list[Judged]:
    return [one for reading in readings.values() for one in reading.judged]


def _untestable(analyses: Analyses) -> list[Judged]:
    """Return the claims of analyses that are not possible at the profile, with the reason."""
    from ablations import claims
    from atdiag.study.claims import Judged

    return [
        Judged(claim, "not testable here", "", note=str(fault))
        for name, fault in analyses.refused.items()
        for claim in claims.of(name)
    ]


def _write_summary(judged: Sequence[Judged], readings: dict[str, Reading], folder: Path) -> Written:
    """Write the table of claims in every format, with the runs on which it is based."""
    import pandas as pd

    from atdiag.reports import latex, tables, writers

    cells, records = [tables.claim_cells(one) for one in judged], [tables.claim_record(one) for one in judged]
    runs = list(dict.fromkeys(run for reading in readings.values() for run in reading.runs))
    texts = {
        "md": "\n".join([*tables.claims_markdown(judged), "", f"{len(runs)} runs: {', '.join(runs)}", ""]),
        "tex": latex.booktabs(tables.CLAIMS, cells, "The papers' claims, here.", "tab:claims", tables.CLAIM_COLUMNS),
        "csv": pd.DataFrame(records).to_csv(index=False),
    }
    verdicts = {name: reading.verdict for name, reading in readings.items()}
    report = {"claims": records, "verdicts": verdicts, "runs": runs}
    return writers.write(folder, "summary", texts, report, figures={})


def _of(verdict: str, number: int) -> str:
    """Return a verdict as that of a number of claims: 1 holds, 2 hold."""
    return verdict if number == 1 else {"holds": "hold", "does not hold": "do not hold"}.get(verdict, verdict)


def _tell(judged: Sequence[Judged], session: ExperimentSession) -> None:
    from collections import Counter

    from atdiag.reports import tables

    console.show_table(tables.claims_table(judged))
    counted = Counter(one.verdict for one in judged)
    seeds = count(len(session.settings.seeds), "seed")
    summary = ", ".join(f"{number} {_of(verdict, number)}" for verdict, number in counted.most_common())
    typer.echo(f"{len(judged)} claims at profile {session.settings.profile.name}, {seeds}: {summary}.")
    if session.settings.profile.name == "mini":
        typer.echo("Profile mini is a working example: miniatures are no evidence about the published teachers.")
