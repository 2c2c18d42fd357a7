"""``atdiag.run``: an experiment in Python, the same as its command. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.api import experiments
from atdiag.api.experiments import Prepared
from atdiag.api.results import Result, as_sets, data_sets, in_own_context
from atdiag.core import paths
from atdiag.core.errors import UserError, suggest
from atdiag.study import registry

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from atdiag.execution.executor import Executor


_OTHERS = {name: name for name in ("diagnose", "intervene", "probe", "similarity", "trace", "maps", "patch")}
_OTHERS |= {"attention-stats": "attention_stats", "attention_stats": "attention_stats", "hooks": "hook_points"}
"""Commands that are no experiments -> their functions in Python."""


@in_own_context
def run(
    ablation: str,
    teacher: str | Path | nn.Module | Sequence[str | Path | nn.Module] | None = None,
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    split: float | None = None,
    budget: str | None = None,
    gpu: str | None = None,
    student: str | Mapping[str, float] | None = None,
    profile: str | None = None,
    seeds: int | None = None,
    first_seed: int | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    recipe: str | None = None,
    equivalence: float | None = None,
    classes: str | Path | None = None,
    runs: str | Path | None = None,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    micro_batch: int | None = None,
    deterministic: bool = False,
    ranks: int = 1,
    track: str | None = None,
    executor: Executor | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Result:
    """Run an experiment and return its answer::

        answer = atdiag.run("reinit", teacher="clip_b", module="attn", seeds=3)
        answer.frame(), answer.verdict, answer.figures, answer.runs

    Trains what no run directory holds yet, in processes of their own, and reads the rest. The same question on the
    command line names the same runs.

    ablation: the name of its command. teacher: a name, a weight file, a network of timm's or ours, or several of these.
    data: a data set's name, a folder, or settings (``{"name": "imagenette", "image_size": 128}``). split: the share of
    a folder's images to hold out for the test. budget: a time such as ``20m`` that chooses the epochs. options: the
    experiment's own, named as on the command line (``module``, ``from_``, ``k=(3, 6)``). student: the size of all
    students, as ``"deit_s"``, ``"timm:MODEL"`` or ``{"width": 384, "depth": 12, "heads": 6}``. settings: others by
    dotted name (``{"recipe.epochs": 2}``). recipe: published recipes by name (``"li2024-copy,mae-scratch"``). runs: the
    folder of runs. out: a folder for tables and figures; default: none are written. executor: None for processes on
    this machine. dry_run: train nothing, and return the plan. The others are those of the command line.

    A network is stored in ``<runs>/teachers``, in a file named by the hash of its weights, which is its identity.

    Raises UserError for wrong input, with nothing written, and FaultError if a training fails.
    """
    function = _function(ablation)
    sets = as_sets(settings)
    named: str | None = None
    if data is not None and "data" in inspect.signature(function).parameters:
        options["data"] = data
    elif isinstance(data, str | Path):
        named = str(data)
    else:
        sets = [*data_sets(data), *sets]
    places = {"runs": runs, "data_dir": data_dir, "classes": classes}
    given: dict[str, Any] = {name: None if path is None else Path(path) for name, path in places.items()}
    given |= {"profile": profile, "seeds": seeds, "first_seed": first_seed, "equivalence": equivalence}
    given |= {
        "device": device,
        "micro_batch": micro_batch,
        "deterministic": deterministic,
        "ranks": ranks,
        "track": track,
    }
    given |= {"data": named, "split": split, "budget": budget, "gpu": gpu, "recipe": recipe}
    given["student"] = ",".join(f"{k}={v}" for k, v in student.items()) if isinstance(student, Mapping) else student
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        paths.writable(folder, "out")
    with contextlib.ExitStack() as stored:
        if teacher is not None:
            options["teacher"] = as_references(teacher, given["runs"], stored)
        ready = experiments.prepare(_made(ablation, function, options), sets, dry_run=dry_run, **given)
        if dry_run:
            return _plan(ready)
        experiments.check([ready.series], ready.plan, ready.session)
        stored.pop_all()  # what is trained with is kept
    experiments.train([ready.series], ready.plan, ready.session, executor)
    return _answer(ready, folder)


def _answer(ready: Prepared, folder: Path | None) -> Result:
    """Read the finished runs, and write tables and figures if a folder was given."""
    from atdiag.reports import document, tables, writers

    reading = ready.session.reading(ready.series)
    return Result(
        ready.series.ablation,
        tables.frame(reading),
        reading.verdict,
        tuple(ready.session.store.root / run for run in reading.runs),
        tuple(tables.notes(reading)),
        document.as_json(reading),
        reading,
        {"": lambda: writers.figure_of(reading)},
        None if folder is None else writers.write_reading(reading, folder),
    )


def _plan(ready: Prepared) -> Result:
    """Return the runs of a plan: arm, seed, id, state, and the seconds that one thread would need."""
    import pandas as pd

    from atdiag.core.text import count, duration
    from atdiag.execution import cost

    store, plan = ready.session.store, ready.plan
    rows: list[dict[str, Any]] = [
        {
            "arm": name,
            "seed": spec.seed.model,
            "run": spec.id,
            "state": store.run(spec).state,
            "thread_seconds": cost.seconds(spec, plan.speed),
        }
        for name, spec in experiments.planned(ready.series)
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    note = f"{count(len(plan.specs), 'run')}, {len(plan.todo)} to do, about {duration(plan.seconds)} on {plan.device}"
    return Result(ready.series.ablation, table, "", tuple(store.root / row["run"] for row in rows), (note,), {}, plan)


def _function(ablation: str) -> Callable[..., Any]:
    """Return an installed ablation. Raises UserError, with a suggestion, for an unknown or broken one."""
    found: dict[str, registry.Installed] = {}
    for one in registry.installed():
        found.setdefault(one.name, one)
    if ablation in _OTHERS and ablation not in found:
        raise UserError(f"{ablation!r} is no experiment", f"call atdiag.{_OTHERS[ablation]}")
    if ablation not in found:
        raise UserError(f"unknown experiment {ablation!r}{suggest(ablation, found)}", f"known: {', '.join(found)}")
    one = found[ablation]
    if one.function is None:
        raise UserError(f"the experiment {ablation!r} of {one.source} can't be loaded ({one.fault})")
    return one.function


def _made(ablation: str, function: Callable[..., Any], options: Mapping[str, Any]) -> experiments.Make:
    """Return an ablation with its own options filled in, as the command line fills them.

    Raises UserError for an option that it does not have, or that is missing.
    """
    own = dict(list(inspect.signature(function, eval_str=True).parameters.items())[1:])
    for name in options:
        if name not in own:
            raise UserError(f"{ablation} has no option {name!r}{suggest(name, own)}", f"it has {', '.join(own)}")
    chosen = {}
    for name, parameter in own.items():
        if name not in options and parameter.default is inspect.Parameter.empty:
            raise UserError(f"{ablation} needs the option {name!r}", f"give {name}=...")
        chosen[name] = _as_typed(options[name], parameter.annotation) if name in options else parameter.default
    return partial(function, **chosen)


def _as_typed(value: Any, annotation: Any) -> Any:
    """Return a value as the command line would pass it: several as ``a,b``, a number as text where text is wanted."""
    kind = annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if str not in kinds or isinstance(value, str | bool | None) or _is_teachers(value):
        return value
    return ",".join(map(str, value)) if isinstance(value, list | tuple | range) else str(value)


class _Teachers(tuple[str, ...]):
    """References to teachers, each taken whole."""


def _is_teachers(value: Any) -> bool:
    return isinstance(value, _Teachers)


def as_references(teacher: Any, runs: Path | None, stored: contextlib.ExitStack) -> str | _Teachers:
    """Return the reference of a teacher, or of several; networks are stored beside the runs, until ``stored`` ends."""
    if isinstance(teacher, str):
        return teacher
    several = teacher if isinstance(teacher, list | tuple) else [teacher]
    if not several:
        raise UserError("no teacher is named", "give a name, a file or a network")
    names = [str(one) if isinstance(one, str | Path) else _stored(one, runs, stored) for one in several]
    return names[0] if len(names) == 1 and not isinstance(several[0], Path) else _Teachers(dict.fromkeys(names))


def _stored(model: Any, runs: Path | None, stored: contextlib.ExitStack) -> str:
    from torch import nn

    from atdiag.networks.registry import storing
    from atdiag.study import settings

    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} is no teacher", "give a name, a file or a network")
    root = settings.resolve(runs=runs).runs
    if not paths.is_folder(root):
        paths.writable(root, "runs")
    folder = root / "teachers"
    before = set(folder.iterdir()) if folder.is_dir() else set()
    reference = storing.store(model, folder)
    file = Path(reference.partition("@")[2])
    if file.name not in {path.name for path in before}:
        stored.callback(_remove, file)
    return reference


def _remove(file: Path) -> None:
    """Remove a stored network, and folders that it leaves empty."""
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        file.parent.rmdir()
        file.parent.parent.rmdir()
