"""A command for each installed ablation: resolve the settings, train what is not finished, report, write, draw.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag import conduct, folders, planning
from atdiag.options import DataDir, Json, Profile, Runs, Set, joined

if TYPE_CHECKING:
    from atdiag.runs import Store
    from atdiag.spec import RunSpec
    from atdiag.study.ablation import Lab, Reading, Series, Study
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
_MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Images that go through a network at once, for want of memory: the result stays the same up to rounding. "
        "[default: recipe.batch_size]",
    ),
]
_Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same bits from a GPU each time, at some cost of speed. A CPU gives them anyway.",
    ),
]

COMMON: dict[str, tuple[Any, Any]] = {
    "profile": (Profile, None),
    "set_": (Set, []),
    "seeds": (_Seeds, None),
    "equivalence": (_Equivalence, None),
    "dry_run": (_DryRun, False),
    "json_": (Json, False),
    "out": (_Out, None),
    "runs": (Runs, None),
    "device": (_Device, None),
    "micro_batch": (_MicroBatch, None),
    "deterministic": (_Deterministic, False),
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
            command = joined(entry.load(), COMMON, _run)
        except Exception as fault:  # another package's fault must not take this one's commands away
            say(f"the experiment {entry.name!r} of {entry.value} can't be loaded ({type(fault).__name__}: {fault})")
            continue
        taken[entry.name] = entry.value
        app.command(entry.name)(command)


LOOKING = ("trace", "similarity", "intervene", "probe", "attention-stats", "maps")
"""Commands that look inside: they train nothing, and write at their end."""

RESERVED = (
    "reproduce",
    "figures",
    "teachers",
    "pretrain",
    "doctor",
    "runs",
    "data",
    *LOOKING,
)
"""Names of commands that are no experiments."""


def stopped(command: str) -> str:
    """What is left of a command that was stopped, by its name."""
    if command in ("pretrain", "reproduce") or command not in RESERVED:
        return "stopped: checkpoints are written, the same command goes on from there"
    if command in LOOKING:
        return "stopped: nothing was written, the same command starts again"
    return "stopped: the same command starts again"


def say(text: str) -> None:
    """Tell the user something in one line, on standard error."""
    typer.echo(f"atdiag: {' '.join(text.splitlines())}", err=True)


@dataclass(frozen=True)
class Bench:
    """What a command works on: resolved settings, where runs lie, and the device."""

    settings: Settings
    store: Store
    device: str
    equivalence: float | None = None
    micro_batch: int | None = None
    deterministic: bool = False

    def reading(self, series: Series) -> Reading:
        """What came out of a series, all of whose runs are finished and measured."""
        from atdiag.study.reading import read

        return read(series, self.settings, self.store, self.equivalence)


def bench(
    profile: str | None,
    set_: list[str],
    seeds: int | None,
    equivalence: float | None,
    runs: Path | None,
    device: str | None,
    data_dir: Path | None,
    micro_batch: int | None = None,
    deterministic: bool = False,
) -> Bench:
    """Resolve what every experiment is told. Raises UserError for whatever is wrong with any of it."""
    from atdiag.runs import Store
    from atdiag.study import profile as profiles
    from atdiag.study import schedule
    from atdiag.training import compiled
    from atdiag.words import UserError

    if data_dir is not None:
        folders.look_in(data_dir)
    if equivalence is not None and not 0 < equivalence < 100:
        raise UserError(f"--equivalence {equivalence:g} is no margin", "give points above 0, such as 0.5")
    compiled.choice()
    settings = profiles.resolve(profile, seeds, set_, runs)
    device = schedule.choose_device(device or settings.profile.device)
    if not settings.runs.is_dir():  # one that is there may be read-only: finished runs are only read
        folders.writable(settings.runs, "--runs")
    return Bench(settings, Store(settings.runs), device, equivalence, micro_batch, deterministic)


def _run(make: Make, dry_run: bool, json_: bool, out: Path | None, set_: list[str], **given: Any) -> None:
    from atdiag.study import outputs
    from atdiag.study.ablation import Lab

    on = bench(set_=set_, **given)
    series = spread(make, Lab(on.settings))
    check_overrides(lambda lab: spread(make, lab).specs, series.specs, on.settings, set_)
    folder = outputs.folder(series, on.settings.profile.name, out.expanduser() if out else None)
    conduct.check_weights(series.specs, on.store)
    if dry_run:
        planning.show(series, on.settings, on.store, on.device, json_)
        return
    conduct.check([series], on.store)
    planning.header(series, on.settings)
    conduct.execute(series.specs, on.settings, on.store, on.device, on.micro_batch, on.deterministic)
    conduct.measure([series], on.store, on.device)
    reading = on.reading(series)
    files = conduct.write(reading, folder)
    conduct.tell(reading, files)
    if json_:
        typer.echo(json.dumps(outputs.as_json(reading, files)))


def spread(make: Make, lab: Lab, leave_out: bool = False) -> Series:
    """An ablation's studies for the teacher that was asked for; for each of several (``a,b``), or of ``all``.

    Of all teachers (with ``leave_out``: of several), those that the ablation refuses are left out, and the series says
    so. Raises UserError for a refused teacher that was named, and where none is left.
    """
    from atdiag.study.ablation import Series, listed

    asked = make.keywords.get("teacher")
    if not isinstance(asked, str) or (asked != "all" and "," not in asked):
        return Series.join([make(lab)])
    names = lab.teachers if asked == "all" else listed(asked, "--teacher", "clip_b,deit_b")
    return Series.of_each(names, lambda name: make(lab, teacher=name), leave_out=leave_out or asked == "all")


def check_overrides(
    plan: Callable[[Lab], list[RunSpec]], specs: list[RunSpec], settings: Settings, sets: list[str]
) -> None:
    """Raise UserError for a setting given with --set that changes none of the runs (``specs``) that are planned."""
    from atdiag.study import profile as profiles
    from atdiag.study.ablation import Lab
    from atdiag.words import UserError

    ids = {spec.id for spec in specs}
    for name in (item.partition("=")[0].strip() for item in sets):
        plain = profiles.without(settings, name)
        if plain is None or plain == settings.profile or _is_so(name, specs, settings):
            continue  # it can't be left out, or says what is so anyway
        others = {key: value for key, value in settings.overrides.items() if key != name}
        try:
            without = plan(Lab(replace(settings, profile=plain, overrides=others)))
        except UserError:
            continue
        if ids == {spec.id for spec in without}:
            raise UserError(f"{name} has no effect here: it changes none of this experiment's runs", "leave it out")


def _is_so(name: str, specs: list[RunSpec], settings: Settings) -> bool:
    """Whether a setting under ``transfer.`` names what some transfer is in any case."""
    section, _, field = name.partition(".")
    if section != "transfer":
        return False
    for spec in (spec for spec in specs if spec.transfer.method != "none"):
        own = spec.transfer
        asked = settings.profile.transfer.transfer(own.method, spec.network.depth, spec.network.heads)
        if getattr(own, field) is not None and getattr(asked, field) == getattr(own, field):
            return True
        if field == "heads" and own.heads is None is asked.heads and own.takes_attention:
            return True
    return False
