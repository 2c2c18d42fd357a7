"""What ``atdiag runs list`` and ``runs show`` print: a line for each run, and the summary of one. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from atdiag.core import asked
from atdiag.core.errors import UserError, suggest
from atdiag.core.runs import Run, Store
from atdiag.core.spec import Data, Network
from atdiag.core.text import count, duration
from atdiag.reports import run_index

STATES = ("finished", "training", "interrupted", "failed", "new", "damaged")

_NARROW = 10
"""Columns that the name of an arm keeps on a terminal, however narrow."""


def rows(store: Store, known: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the row of every run, oldest first: the index's, with its experiments, its arm, and its age in seconds.

    known: names of experiments, by which the command line is recognised that ordered a run, where nothing else tells.
    """
    named = asked.read(store)
    now = time.time()
    out = []
    for row in run_index.rows(store):
        who = dict(reversed(named.get(row["run"], {}).items()))  # the one that asked last comes first
        ordered = [row["ordered_by"]] if row["ordered_by"] in known else []
        arm = next(filter(None, who.values()), _described(row))
        more = {"experiments": [*who] or ordered, "arm": arm, "arms": who}
        out.append({**row, **more, "age": _age(store, row["run"], now)})
    return out


def _age(store: Store, run: str, now: float) -> float | None:
    """Return the seconds since a run finished, or was begun."""
    for name in ("result.json", "spec.json"):
        try:
            return round(now - (store.root / run / name).stat().st_mtime, 1)
        except OSError:
            continue
    return None


def _described(row: Mapping[str, Any]) -> str:
    """Describe an arm by what its run is: ``copy 6-11, layer_scale, from teacher less attn``; ``scratch``."""
    parts = [row["transfer"] if row["transfer"] != "none" else ""]
    parts += [row["student"] if row["student"] != "standard" else ""]
    parts += [f"from {row['start']}" if row["start"] not in ("scratch", "") else ""]
    return ", ".join(filter(None, parts)) or ("scratch" if row["transfer"] else "")


def chosen(
    listed: Iterable[dict[str, Any]],
    ablation: str | None,
    teacher: str | None,
    state: str | None,
    known: Collection[str],
) -> list[dict[str, Any]]:
    """Return the rows of an experiment, a teacher and a state; each may be several, with commas.

    teacher: by name, or ``none``. known: names of installed experiments. Raises UserError for an unknown state or
    experiment, and for a teacher of none of the rows.
    """
    out = list(listed)
    of = {name for row in out for name in row["experiments"]}
    wanted = {"ablation": _parts(ablation), "teacher": _parts(teacher), "state": _parts(state)}
    teachers = {name for row in out for name in (row["teacher"], _plain(row["teacher"]))} - {""} | {"none"}
    for argument, names in (("ablation", {*known, *of}), ("teacher", teachers), ("state", {*STATES})):
        for name in wanted[argument] - names:
            here = "not among these runs" if argument == "teacher" else "unknown"
            raise UserError(
                f"`{argument}` {name!r} is {here}{suggest(name, names)} (known: {', '.join(sorted(names))})"
            )
    if ablation:
        out = [_as_asked_by(row, wanted["ablation"]) for row in out if wanted["ablation"] & {*row["experiments"]}]
    if teacher:
        out = [row for row in out if {row["teacher"], _plain(row["teacher"])} & wanted["teacher"]]
    return [row for row in out if row["state"] in wanted["state"]] if state else out


def _as_asked_by(row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a row with the first of these experiments that asked for the run in front, and its name of the arm."""
    first = next(name for name in row["experiments"] if name in names)
    others = [name for name in row["experiments"] if name != first]
    return {**row, "experiments": [first, *others], "arm": row["arms"].get(first) or row["arm"]}


def _parts(text: str | None) -> set[str]:
    return {part.strip() for part in (text or "").split(",") if part.strip()}


def _plain(teacher: str) -> str:
    """Drop the profile from a teacher's label; ``none`` without a teacher."""
    return teacher.partition(" ")[0] or "none"


def lines(listed: Sequence[Mapping[str, Any]], wide: bool, width: int | None) -> list[str]:
    """Format rows under a line of headings, in columns two spaces apart.

    wide: all columns, and ids and lists in full. width: columns of the terminal, which shorten the arm's name; None:
    nothing is shortened, as for a pipe.
    """
    heads = ["experiment", "arm", "seed", "top-1", "state", "age", "id"]
    if wide:
        heads[2:2] = ["teacher", "student", "start", "transfer", "data"]
    digits = 16 if wide else 8 if width is not None and width < 80 else 12
    cells = [_cells(row, wide, digits) for row in listed]
    widths = [max(len(head), *(len(row[i]) for row in cells), 0) for i, head in enumerate(heads)]
    if width is not None and not wide:
        spare = width - (sum(widths) + 2 * (len(widths) - 1))
        widths[1] = max(_NARROW, widths[1] + min(spare, 0))
    return [_line(row, heads, widths) for row in (heads, *cells)]


def _cells(row: Mapping[str, Any], wide: bool, digits: int) -> list[str]:
    who = list(row["experiments"])
    named = ",".join(who) if wide or len(who) < 2 else f"{who[0]} +{len(who) - 1}"
    data, _, model = str(row["seed"]).partition("/")
    top1 = "-" if row["top1"] is None else f"{row['top1']:.1f}"
    teacher = _plain(row["teacher"]) if row["teacher"] else ""
    arm = f"{teacher}: {row['arm']}" if teacher and teacher not in row["arm"] and not wide else row["arm"]
    middle = [row["teacher"] or "-", row["student"], row["start"], row["transfer"], row["data"]] if wide else []
    return [
        named or "-",
        arm or "-",
        *(one or "-" for one in middle),
        (data if data == model else f"{data}/{model}") or "-",
        top1,
        row["state"],
        _short(row["age"]),
        row["run"][:digits],
    ]


def _short(seconds: float | None) -> str:
    """Format an age in few letters: ``40s``, ``12m``, ``5h``, ``9d``."""
    if seconds is None:
        return "-"
    steps = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    size, unit = next((one for one in steps if seconds >= one[0]), steps[-1])
    return f"{max(0, int(seconds // size))}{unit}"


def _line(cells: Sequence[str], heads: Sequence[str], widths: Sequence[int]) -> str:
    out = []
    for cell, head, width in zip(cells, heads, widths, strict=True):
        shown = cell if len(cell) <= width else f"{cell[: width - 1]}…"
        out.append(f"{shown:>{width}}" if head in ("top-1", "age") else f"{shown:{width}}")
    return "  ".join(out).rstrip()


# --- one run ---------------------------------------------------------------------------------------------------------


def summary(run: Run, store: Store) -> list[str]:
    """Return what a run is and how it went, in about ten lines. Raises DamagedRunError."""
    spec = run.spec
    row = run_index.listed(run)
    who = asked.read(store).get(run.id, {})
    age = _age(store, run.id, time.time())
    told: dict[str, str] = {
        "run": f"{run.id}, {run.state}" + ("" if age is None else f" {_short(age)} ago"),
        "asked by": "; ".join(f"{name}: {arm or _described(row)}" for name, arm in who.items()) or "not recorded",
        "teacher": row["teacher"] or "none",
        "student": _student(spec.network),
        "start": row["start"],
        "transfer": row["transfer"],
        "data": _data(spec.data),
        "recipe": f"{count(spec.recipe.epochs, 'epoch')} in batches of {spec.recipe.batch_size}, "
        f"learning rate {spec.recipe.lr:g}",
        "seed": str(spec.seed.model) if spec.seed.data == spec.seed.model else row["seed"],
        "result": _result(run),
        "files": str(run.path),
    }
    return [f"{name:9} {text}" for name, text in told.items()]


def _student(network: Network) -> str:
    own = ", ".join(network.components) or "standard"
    return (
        f"{own}; {network.image_size} px in patches of {network.patch_size}, width {network.width}, "
        f"{count(network.depth, 'block')}, {count(network.heads, 'head')}"
    )


def _data(data: Data) -> str:
    held = f", {data.validation:,} for validation" if data.validation and data.validation >= 1 else ""
    return f"{data.name}, {data.train:,} training images{held}"


def _result(run: Run) -> str:
    if failure := run.failure():
        return f"failed at step {failure.get('step')}: {failure.get('cause')}"
    if not run.finished:
        done = run.progress()
        return f"{count(len(done), 'epoch')} so far" if done else "none yet"
    result = run.result()
    environment = result.get("environment", {})
    seconds = result.get("seconds")
    time_ = f", {duration(seconds)}" if isinstance(seconds, int | float) else ""
    return f"top-1 {result['top1']:.2f} %{time_}" + (f" on {place}" if (place := environment.get("device")) else "")
