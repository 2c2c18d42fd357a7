"""``atdiag reproduce``: all analyses as one set of runs, and one table of claims. ``atdiag figures``: what is finished.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import conduct, experiments, folders, planning
from atdiag.experiments import Bench
from atdiag.options import joined
from atdiag.study.ablation import LEFT_OUT, Lab  # light: every ablation has it
from atdiag.words import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atdiag.runs import Store
    from atdiag.spec import RunSpec
    from atdiag.study.ablation import Reading, Series
    from atdiag.study.claims import Judged
    from atdiag.words import UserError

_Quick = Annotated[bool, typer.Option("--quick", help="Fewer teachers, fewer variants of each analysis.")]


@dataclass(frozen=True)
class Plan:
    """The analyses that can be made at a profile, and why the others can't."""

    series: dict[str, Series]
    refused: dict[str, UserError]

    @property
    def specs(self) -> list[RunSpec]:
        """All runs, each once."""
        return list({spec.id: spec for series in self.series.values() for spec in series.specs}.values())


def add_commands(app: typer.Typer) -> None:
    """Both commands, with the options of the experiments."""
    app.command("reproduce")(joined(reproduce, experiments.COMMON, _reproduce))
    training = ("dry_run", "device", "micro_batch", "deterministic")
    common = {name: option for name, option in experiments.COMMON.items() if name not in training}
    app.command("figures")(joined(figures, common, _figures))


def reproduce(lab: Lab, quick: _Quick = False) -> Plan:
    """Make all analyses of the 2026 paper, and say what became of its claims.

    What several analyses share is trained once, and what is finished never again. Stopped at any point, the same line
    goes on.
    """
    from ablations.reproduction import options

    return _plan(lab, options(lab.settings.profile.name, quick))


def figures(
    lab: Lab,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Analyses, such as benchmark; or all.")],
    quick: _Quick = False,
) -> tuple[Plan, list[str]]:
    """Draw figures and write tables of finished analyses; trains nothing."""
    from ablations.reproduction import ABLATIONS, options
    from atdiag.study.ablation import choose

    chosen = options(lab.settings.profile.name, quick)
    wanted = [choose(name, ("all", *ABLATIONS), "figures") for name in names]
    return _plan(lab, chosen if "all" in wanted else {name: chosen[name] for name in wanted}), wanted


def _plan(lab: Lab, options: Any) -> Plan:
    from ablations.reproduction import ABLATIONS, combinations
    from atdiag.study.ablation import Series
    from atdiag.words import UserError

    series: dict[str, Series] = {}
    refused: dict[str, UserError] = {}
    for name, chosen in options.items():
        try:
            parts = [
                experiments.spread(partial(ABLATIONS[name], **one), lab, leave_out=True) for one in combinations(chosen)
            ]
        except UserError as fault:
            refused[name] = fault
        else:
            series[name] = Series.join(parts)
    return Plan(series, refused)


def _reproduce(
    make: partial[Plan], dry_run: bool, json_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:
    on = experiments.bench(set_=set_, **given)
    plan = make(Lab(on.settings))
    if not plan.series:
        raise next(iter(plan.refused.values()))
    experiments.check_overrides(lambda lab: make(lab).specs, plan.specs, on.settings, set_)
    folder = _folder("reproduce", on, out)
    conduct.check_weights(plan.specs, on.store)
    _show(plan, on)
    if dry_run:
        if json_:
            typer.echo(json.dumps(_as_json(plan, on.store)))
        return
    conduct.check(list(plan.series.values()), on.store)
    begun = time.monotonic()
    conduct.execute(plan.specs, on.settings, on.store, on.device, on.micro_batch, on.deterministic)
    conduct.measure(list(plan.series.values()), on.store, on.device)
    readings = {name: on.reading(series) for name, series in plan.series.items()}
    files = _write_all(readings, folder)
    judged = [*_judged(readings), *_untestable(plan)]
    files += _write_summary(judged, readings, folder)
    _tell(judged, on)
    typer.echo(f"{planning.duration(time.monotonic() - begun)} in all\n")
    for path in files:
        if path.suffix in (".md", ".png"):
            typer.echo(f"  {path}")
    if json_:
        typer.echo(json.dumps(json.loads((folder / "summary.json").read_text())))


def _figures(
    make: partial[tuple[Plan, list[str]]], json_: bool, out: Path | None, set_: list[str], **given: Any
) -> None:
    from atdiag.study import schedule
    from atdiag.words import UserError

    on = experiments.bench(set_=set_, device=None, **given)
    plan, wanted = make(Lab(on.settings))
    folder = _folder("figures", on, out)
    readings: dict[str, Reading] = {}
    left: list[str] = [f"{name}: {fault}" for name, fault in plan.refused.items()]
    for name, series in plan.series.items():
        missing = len(schedule.pending(series.specs, on.store)) or len(_unmeasured([series], on.store))
        if missing:
            left.append(f"{name}: {count(missing, 'run')} of {len(series.specs)} not finished or not measured")
        else:
            readings[name] = on.reading(series)
    if not readings or (left and "all" not in wanted):
        raise UserError("; ".join(left), "the same line with 'reproduce' for 'figures NAME' trains them")
    files = _write_all(readings, folder)
    for path in files:
        if path.suffix in (".png", ".pdf", ".txt"):
            typer.echo(f"  {path}")
    for line in left:
        typer.echo(f"not drawn: {line}")
    if json_:
        typer.echo(json.dumps({"files": [str(path) for path in files], "left": left}))


def _folder(name: str, on: Bench, out: Path | None) -> Path:
    folder = out.expanduser() if out else Path("results") / f"{name}-{on.settings.profile.name}"
    folders.writable(folder, "--out")
    return folder


def _unmeasured(series: Sequence[Series], store: Store) -> list[RunSpec]:
    """The runs that have not been measured as their studies ask, once for each measurement."""
    runs = [(measurement, spec, store.run(spec)) for measurement, specs in conduct.wanted(series) for spec in specs]
    return [spec for measurement, spec, run in runs if not run.finished or measurement.missing([run])]


def _show(plan: Plan, on: Bench) -> None:
    """What would be run: for each analysis its runs, those that no earlier one has, and the time that they take."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from atdiag.study import schedule

    speed = schedule.measured_speed(on.store, on.device)
    table = Table(title="reproduce: all analyses as one set of runs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("analysis")
    for name in ("studies", "runs", "of its own", "to do", "thread time"):
        table.add_column(name, justify="right")
    typer.echo("atdiag reproduce: the analyses of Qin et al. 2026")
    planning.scale(tuple(study for series in plan.series.values() for study in series.studies), on.settings)
    seen: set[str] = set()
    for name, series in plan.series.items():
        own = [spec for spec in series.specs if spec.id not in seen]
        seen |= {spec.id for spec in own}
        todo = schedule.pending(own, on.store)
        cost = planning.duration(sum(schedule.seconds(spec, speed) for spec in todo)) if todo else ""
        cells = (len(series.studies), len(series.specs), len(own), len(todo), cost)
        table.add_row(name, *map(str, cells))
    Console().print(table)
    for name, fault in plan.refused.items():
        typer.echo(f"- {name} is not testable here: {fault}")
    for note in dict.fromkeys(note for series in plan.series.values() for note in series.notes):
        if note.startswith(LEFT_OUT):
            typer.echo(f"- {note}")
    todo = schedule.pending(plan.specs, on.store)
    processes = schedule.processes_for(on.device, on.settings.profile.threads)
    measured = _unmeasured(list(plan.series.values()), on.store)
    after = sum(schedule.testing_seconds(spec, speed) for spec in measured)
    wall = schedule.estimate(todo, processes, speed) + after
    then = f", {count(len(measured), 'measurement')} of finished runs" if measured else ""
    typer.echo(
        f"{count(len(plan.specs), 'run')}, {len(todo)} to do{then}: about {planning.duration(wall)} in "
        f"{count(processes, 'process')} on {on.device}."
    )


def _as_json(plan: Plan, store: Store) -> dict[str, Any]:
    return {
        name: [{"run": spec.id, "state": store.run(spec).state} for spec in series.specs]
        for name, series in plan.series.items()
    }


def _write_all(readings: dict[str, Reading], folder: Path) -> list[Path]:
    return [path for name, reading in readings.items() for path in conduct.write(reading, folder / name)]


def _judged(readings: dict[str, Reading]) -> list[Judged]:
    return [one for reading in readings.values() for one in reading.judged]


def _untestable(plan: Plan) -> list[Judged]:
    """The claims of analyses that can't be made at the profile, with the reason."""
    from ablations import claims
    from atdiag.study.claims import Judged

    return [
        Judged(claim, "not testable here", "", note=str(fault))
        for name, fault in plan.refused.items()
        for claim in claims.of(name)
    ]


def _write_summary(judged: Sequence[Judged], readings: dict[str, Reading], folder: Path) -> list[Path]:
    """The table of claims in every form, with the runs that it stands on."""
    import pandas as pd

    from atdiag.runs import write_atomically
    from atdiag.study import tables

    cells, records = [tables.claim_cells(one) for one in judged], [tables.claim_record(one) for one in judged]
    runs = list(dict.fromkeys(run for reading in readings.values() for run in reading.runs))
    content = {
        "md": "\n".join([*tables.claims_markdown(judged), "", f"{len(runs)} runs: {', '.join(runs)}", ""]),
        "tex": tables.booktabs(tables.CLAIMS, cells),
        "csv": pd.DataFrame(records).to_csv(index=False),
        "json": json.dumps(
            {
                "claims": records,
                "verdicts": {name: reading.verdict for name, reading in readings.items()},
                "runs": runs,
            },
            indent=1,
        ),
    }
    paths = [folder / f"summary.{kind}" for kind in content]
    for path, text in zip(paths, content.values(), strict=True):
        write_atomically(path, text)
    return paths


def _tell(judged: Sequence[Judged], on: Bench) -> None:
    from collections import Counter

    from rich.console import Console

    from atdiag.study import tables

    Console().print(tables.claims_table(judged))
    counted = Counter(one.verdict for one in judged)
    seeds = count(len(on.settings.seeds), "seed")
    summary = ", ".join(f"{number} {verdict}" for verdict, number in counted.most_common())
    typer.echo(f"{len(judged)} claims at profile {on.settings.profile.name}, {seeds}: {summary}.")
    if on.settings.profile.name == "mini":
        typer.echo("Profile mini is a working example: miniatures are no evidence about the published teachers.")
