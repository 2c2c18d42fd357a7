"""A command for each installed ablation: resolve the settings, train what is not finished, report, write, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import conduct, folders, planning
from atdiag.options import DataDir, Json, Profile, Runs, Set, joined

if TYPE_CHECKING:
    from atdiag.study.ablation import Lab, Series, Study
    from atdiag.study.profile import Settings

    Make = partial[Study | Series]
    """An ablation with its own options; what is missing is the lab."""

_Seeds = Annotated[int | None, typer.Option(help="How many seeds. [default: the profile's; mini: 3]")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be run, what is finished, and the cost.")]
_Out = Annotated[
    Path | None,
    typer.Option(help="Folder for table and figure. [default: ./results/<ablation>-<teacher>-<profile>]"),
]
_Equivalence = Annotated[
    float | None,
    typer.Option(help="Margin in points within which a contrast is said to make no difference (two one-sided tests)."),
]
_Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu. [default: the profile's; mini: cpu]")]

_COMMON: dict[str, tuple[Any, Any]] = {
    "profile": (Profile, None),
    "set_": (Set, []),
    "seeds": (_Seeds, None),
    "equivalence": (_Equivalence, None),
    "dry_run": (_DryRun, False),
    "json_": (Json, False),
    "out": (_Out, None),
    "runs": (Runs, None),
    "device": (_Device, None),
    "data_dir": (DataDir, None),
}
"""The options that every experiment has: annotation and default."""


def add_commands(app: typer.Typer) -> None:
    """A command for each installed ablation: its own options, then those that all experiments have."""
    taken: dict[str, str] = {}
    # Ours first, so that no other package can take the name of one by accident.
    for entry in sorted(
        entry_points(group="atdiag.ablations"), key=lambda entry: not entry.value.startswith("ablations.")
    ):
        if entry.name in taken or entry.name in RESERVED:
            say(f"the experiment {entry.name!r} of {entry.value} is left out: that name is taken")
            continue
        try:
            command = joined(entry.load(), _COMMON, _run)
        except Exception as fault:  # another package's fault must not take this one's commands away
            say(f"the experiment {entry.name!r} of {entry.value} can't be loaded ({type(fault).__name__}: {fault})")
            continue
        taken[entry.name] = entry.value
        app.command(entry.name)(command)


RESERVED = (
    "teachers",
    "pretrain",
    "doctor",
    "runs",
    "data",
    "trace",
    "similarity",
    "intervene",
    "probe",
    "attention-stats",
    "maps",
)
"""Names of commands that are no experiments."""


def say(text: str) -> None:
    """Tell the user something in one line, on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)


def _run(
    make: Make,
    profile: str | None,
    set_: list[str],
    seeds: int | None,
    equivalence: float | None,
    dry_run: bool,
    json_: bool,
    out: Path | None,
    runs: Path | None,
    device: str | None,
    data_dir: Path | None,
) -> None:
    from atdiag.runs import Store
    from atdiag.study import outputs, schedule
    from atdiag.study import profile as profiles
    from atdiag.study.ablation import Lab
    from atdiag.study.reading import read
    from atdiag.training import compiled
    from atdiag.words import UserError

    if data_dir is not None:
        folders.look_in(data_dir)
    if equivalence is not None and not 0 < equivalence < 100:
        raise UserError(f"--equivalence {equivalence:g} is no margin", "give points above 0, such as 0.5")
    compiled.choice()
    settings = profiles.resolve(profile, seeds, set_, runs)
    device = schedule.choose_device(device or settings.profile.device)
    series = spread(make, Lab(settings))
    _check_overrides(make, series, settings, [item.partition("=")[0].strip() for item in set_])
    store = Store(settings.runs)
    folder = outputs.folder(series, settings.profile.name, out.expanduser() if out else None)
    folders.writable(settings.runs, "--runs")
    conduct.check_weights(series, store)
    if dry_run:
        planning.show(series, settings, store, device, json_)
        return
    conduct.check_data(series, store)
    conduct.check_teachers(series)
    planning.header(series, settings)
    conduct.execute(series.specs, settings, store, device)
    conduct.measure([series], store, device)
    reading = read(series, settings, store, equivalence)
    files = conduct.write(reading, folder)
    conduct.tell(reading, files)
    if json_:
        typer.echo(json.dumps(outputs.as_json(reading, files)))


def spread(make: Make, lab: Lab) -> Series:
    """An ablation's studies for the teacher that was asked for; for each of several (``a,b``), or of ``all``.

    Of all teachers, those that the ablation refuses are left out, and the series says so. Raises UserError for a
    refused teacher that was named.
    """
    from atdiag.study.ablation import Series, listed
    from atdiag.words import UserError

    asked = make.keywords.get("teacher")
    if not isinstance(asked, str) or (asked != "all" and "," not in asked):
        return Series.join([make(lab)])
    parts: list[Study | Series] = []
    refused: list[UserError] = []
    for name in lab.teachers if asked == "all" else listed(asked, "--teacher", "clip_b,deit_b"):
        try:
            parts.append(make(lab, teacher=name))
        except UserError as fault:
            if asked != "all":
                raise
            refused.append(fault)
    if not parts:
        raise refused[0]
    series = Series.join(parts)
    return replace(series, notes=(*series.notes, *(f"Left out: {fault}." for fault in refused)))


def _check_overrides(make: Make, series: Series, settings: Settings, names: list[str]) -> None:
    """Raise UserError for a name given with --set that changes no run of the series."""
    from atdiag.study import profile as profiles
    from atdiag.study.ablation import Lab
    from atdiag.words import UserError

    ids = {spec.id for spec in series.specs}
    for name in names:
        plain = profiles.without(settings, name)
        if plain is None or plain == settings.profile or _is_so(name, series, settings):
            continue  # it can't be left out, or says what is so anyway
        others = {key: value for key, value in settings.overrides.items() if key != name}
        try:
            without = spread(make, Lab(replace(settings, profile=plain, overrides=others)))
        except UserError:
            continue
        if ids == {spec.id for spec in without.specs}:
            raise UserError(f"{name} has no effect here: it changes none of this experiment's runs", "leave it out")


def _is_so(name: str, series: Series, settings: Settings) -> bool:
    """Whether a setting under ``transfer.`` names what some transfer of the series is in any case."""
    section, _, field = name.partition(".")
    if section != "transfer":
        return False
    for spec in (spec for spec in series.specs if spec.transfer.method != "none"):
        own = spec.transfer
        asked = settings.profile.transfer.transfer(own.method, spec.network.depth, spec.network.heads)
        if getattr(own, field) is not None and getattr(asked, field) == getattr(own, field):
            return True
        if field == "heads" and own.heads is None is asked.heads and own.takes_attention:
            return True
    return False
