"""``atdiag cost``: what each method transfers, and what a training step of it costs on this machine.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli.options import EXPERIMENT, joined
from atdiag.core import text
from atdiag.reports import console
from atdiag.study.builder import Lab  # light: every ablation imports it

if TYPE_CHECKING:
    from ablations.cost import Costs
    from atdiag.core.spec import RunSpec
    from atdiag.reports.writers import Written
    from atdiag.study.claims import Judged

_OPTIONS = ("profile", "data", "set_", "json_", "out", "device")
_HEAD = ("step", "as maps", "as q, k", "ms", "time / scratch [95 %]", "MiB", "memory / scratch")


def add_commands(app: typer.Typer) -> None:
    """Add the command, with those options of the experiments that it has."""
    app.command("cost")(joined(cost, {name: EXPERIMENT[name] for name in _OPTIONS}, _cost))


def cost(
    lab: Lab,
    teacher: Annotated[
        str | None, typer.Option(help="A teacher, such as deit_s; no weights needed. [default: deit_s; paper: mae_l]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of a step. [default: the profile's recipe's; paper: 16]")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed rounds, 6 or more; 0: count only. [default: 21, or 0 if that takes over 10 minutes]"),
    ] = None,
) -> Any:
    """Count what a transfer passes, and time its training step.

    Activations for each image, counted as maps and as queries and keys; and a step's time and memory on this machine,
    of fine-tuning, of distilling logits (KD), and of copying and distilling attention, beside plain training.
    """
    from ablations.cost import planned

    return planned(lab, teacher, batch), repeats


def _cost(
    make: partial[tuple[Costs, int | None]],
    profile: str | None,
    data: str | None,
    set_: list[str],
    json_: bool,
    out: Path | None,
    device: str | None,
) -> None:
    from ablations.cost import findings, step
    from atdiag.api.experiments import check_overrides
    from atdiag.api.sessions import stem
    from atdiag.core import paths
    from atdiag.reports import tables
    from atdiag.reports.document import plain
    from atdiag.study import settings as profiles

    settings = profiles.resolve(profile, sets=set_, data=data, training=False)
    costs, repeats = make(Lab(settings))

    def again(lab: Lab) -> list[RunSpec]:
        return list(make(lab)[0].specs.values())

    check_overrides(again, list(costs.specs.values()), settings, set_, step, "no step")
    folder = out.expanduser() if out else Path("results") / f"cost-{plain(costs.teacher.name)}-{settings.profile.name}"
    paths.writable(folder, "out")
    costs, told = taken(costs, device or settings.profile.device, settings.profile.threads, repeats)
    judged = findings(costs)
    console.show_table(_table(costs))
    console.show_table(tables.claims_table(judged))
    for note in [*told, *_notes(costs)]:
        typer.echo(f"- {note}")
    name = stem(f"batch-{costs.batch}", *map(step, costs.specs.values()))
    written = write(costs, judged, folder, name, settings.overrides)
    console.show_files([path for path in written.files if path.suffix in (".md", ".png")])
    if json_:
        typer.echo(json.dumps(record(costs, judged) | written.record()))


def taken(costs: Costs, device: str | None, threads: int | None, repeats: int | None) -> tuple[Costs, list[str]]:
    """Measure on a device of this machine, and return the costs with what there is to say about it.

    repeats: None for the usual number, and for none at all where that would take long; 0: measure nothing.
    """
    from ablations.cost import PATIENCE, REPEATS, check_repeats, measured, seconds_needed
    from atdiag.execution import bench, devices
    from atdiag.execution import cost as estimates

    if repeats == 0:
        return costs, []
    at = devices.resolve(device)
    speed = bench.kept(at) or estimates.usual(at)
    needed = seconds_needed(costs, REPEATS if repeats is None else repeats, speed)
    if repeats is None and needed > PATIENCE:
        why = f"Not measured: on {at} it would take about {text.duration(needed)}. --repeats {REPEATS} measures, too."
        return costs, [why]
    check_repeats(REPEATS if repeats is None else repeats)
    rounds = text.count(REPEATS if repeats is None else repeats, "round")
    typer.echo(f"a step of {len(costs.specs)} methods on {at}, {rounds}: about {text.duration(needed)}", err=True)
    with console.counted(f"a step of each method on {at}") as report:
        return measured(costs, at, threads, REPEATS if repeats is None else repeats, report), []


def write(
    costs: Costs,
    judged: list[Judged],
    folder: Path,
    name: str = "cost",
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Written:
    """Write table, claims and, if costs were measured, the figure. overrides: settings that the table names."""
    import pandas as pd

    from ablations.cost import METHODS
    from atdiag.reports import tables, writers
    from atdiag.study.protocol import BASELINE
    from figures.cost import cost as draw

    rows = record(costs, judged)["methods"]
    head = [f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
    said = [f"cost of {costs.teacher.label}, batch {costs.batch}"]
    said += [f"{setting}={value}" for setting, value in overrides.items()]
    lines = [
        f"{', '.join(said)}:",
        "",
        *head,
        *(f"| {' | '.join(cells)} |" for cells in _cells(costs)),
        "",
        *tables.claims_markdown(judged),
        "",
    ]
    texts = {
        "csv": pd.DataFrame(rows).to_csv(index=False),
        "md": "\n".join([*lines, *(f"- {note}" for note in _notes(costs)), ""]),
    }
    title = f"cost, {costs.teacher.label}, batch {costs.batch}\n{costs.machine.get('device', '')}"
    memory = {name: value for name in METHODS if (value := costs.memory_of(name)) is not None}
    times = {name: costs.time_of(name) for name in METHODS} if costs.seconds else {}
    figures = {"": lambda: draw(title, times, memory, BASELINE)} if times else {}
    return writers.write(folder, name, texts, record(costs, judged), figures)


def record(costs: Costs, judged: list[Judged]) -> dict[str, Any]:
    """Return the JSON document: counts and measurements by method, machine, claims."""
    from statistics import median

    from atdiag.execution.cost import activations
    from atdiag.reports import tables

    methods: list[dict[str, Any]] = []
    for name, spec in costs.specs.items():
        passed = activations(spec)
        one: dict[str, Any] = {"method": name, "as_maps": passed.as_maps, "as_qk": passed.as_qk}
        if costs.seconds:
            ratio = costs.time_of(name)
            one |= {"seconds": median(costs.seconds[name]), "time": ratio.value, "low": ratio.low, "high": ratio.high}
        if costs.memory:
            one |= {"mib": costs.memory[name], "memory": costs.memory_of(name)}
        methods.append(one)
    return {
        "teacher": costs.teacher.label,
        "batch": costs.batch,
        "rounds": len(next(iter(costs.seconds.values()), [])),
        "machine": dict(costs.machine),
        "methods": methods,
        "claims": [tables.claim_record(one) for one in judged],
    }


def _cells(costs: Costs) -> list[list[str]]:
    rows = record(costs, [])["methods"]

    def cells(row: dict[str, Any]) -> list[str]:
        timed, sized = "seconds" in row, "mib" in row
        return [
            row["method"],
            f"{row['as_maps']:,}",
            f"{row['as_qk']:,}",
            f"{1000 * row['seconds']:.1f}" if timed else "",
            f"{row['time']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if timed else "",
            f"{row['mib']:.0f}" if sized else "",
            f"{row['memory']:.2f}" if sized else "",
        ]

    return [cells(row) for row in rows]


def _table(costs: Costs) -> Any:
    table = console.table(f"cost - {costs.teacher.label}, batch {costs.batch}", *_HEAD)
    for cells in _cells(costs):
        table.add_row(*cells)
    return table


def _notes(costs: Costs) -> list[str]:
    out = ["Activations that pass from teacher to student for each image, by both ways of counting of Li et al. 2024."]
    if not costs.seconds:
        return out
    rounds = len(next(iter(costs.seconds.values())))
    out.append(
        f"Time: forward pass, loss, backward pass and optimiser, without reading images; median of the ratios of "
        f"{rounds} rounds, methods in turns. Its interval is over rounds on this machine, not over seeds or machines."
    )
    if costs.memory:
        out.append("Memory: what one step needs above the networks and the optimiser's state; measured once.")
    if lacking := costs.teacher.network.differences:
        out.append(f"{costs.teacher.label} also has {', '.join(lacking)}, which the network that was timed lacks.")
    return out
