"""Experiments: plan an ablation over its teachers, check it, train what is missing, read the answer. Prints nothing.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from atdiag.api.sessions import ExperimentSession, open_session
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.execution import devices, gpus

_ON_GPUS = ("small", "paper")
"""Profiles whose plans are for a GPU."""

if TYPE_CHECKING:
    from atdiag.core.runs import Store
    from atdiag.core.spec import RunSpec
    from atdiag.execution.executor import Executor
    from atdiag.execution.plan import Plan
    from atdiag.execution.slurm import Submission
    from atdiag.study.builder import Lab
    from atdiag.study.own import Budget
    from atdiag.study.protocol import Series, Study
    from atdiag.study.settings import Settings

    Make = partial[Study | Series]
    """An ablation with its own options filled in; its remaining argument is the lab."""


@dataclass(frozen=True)
class Prepared:
    """A planned experiment: what it asks, which of its runs are unfinished, and where."""

    series: Series
    plan: Plan
    session: ExperimentSession


def prepare(
    make: Make,
    sets: Sequence[str],
    spoken: Callable[[str], str] = str,
    budget: str | None = None,
    gpu: str | None = None,
    dry_run: bool = False,
    **given: Any,
) -> Prepared:
    """Plan an experiment. Raises UserError for any invalid option.

    sets: settings as ``NAME=VALUE``. spoken: spells the arguments that are named in notes. budget: a time such as
    ``20m`` that chooses the epochs; gpu: the kind of GPU that it, or a dry run, is meant for. given: the other options
    of :func:`~atdiag.api.sessions.open_session`.
    """
    from atdiag.study.builder import Lab
    from atdiag.study.own import Budget

    wanted = Budget.parse(budget, gpu)
    if gpu is not None:
        given["device"] = given.get("device") or "cuda"
    session = replace(open_session(set_=list(sets), **given), gpu=gpu)
    if dry_run and gpu is None and needs_gpu(session):
        session = replace(session, gpu=gpus.USUAL)
    glance(make, session.settings)
    session = fitted(make, session, wanted)
    series = spread(make, Lab(session.settings), spoken=spoken)
    check_overrides(lambda lab: spread(make, lab).specs, series.specs, session.settings, list(sets))
    check_classes([series], session.settings)
    return Prepared(series, session.plan(series.specs), session)


def needs_gpu(session: ExperimentSession) -> bool:
    """Return whether a plan should be for a GPU though none is here: at a profile that no CPU trains, unless asked."""
    here = any(map(devices.is_here, ("cuda", "mps")))
    return session.options.device is None and session.settings.profile.name in _ON_GPUS and not here


def glance(make: Make, settings: Settings) -> None:
    """Raise UserError for a teacher that can't be meant, before anything is loaded that takes seconds."""
    from atdiag.networks.registry import teachers

    for reference in _named(make):
        teachers.glance(reference, settings.profile.name, settings.profile.data.image_size)


def fitted(make: Make, session: ExperimentSession, budget: Budget | None) -> ExperimentSession:
    """Return the session with what is chosen for its teacher and its budget, if it has one of each."""
    from atdiag.study import own
    from atdiag.study.builder import Lab

    if len(names := _named(make)) == 1:
        session = replace(session, settings=own.suited(session.settings, names[0]))
    if budget is None:
        return session

    def planned(settings: Settings) -> list[RunSpec]:
        return spread(make, Lab(settings)).specs

    settings, choice = own.within(session.settings, budget, planned, session.store, session.options)
    return replace(session, settings=settings, choice=choice)


def _named(make: Make) -> tuple[str, ...]:
    """Return the references of the teachers that are asked for; none for ``all``, and where an ablation chooses."""
    asked = make.keywords.get("teacher")
    if isinstance(asked, tuple):
        return asked
    return references(asked) if isinstance(asked, str) and asked != "all" else ()


def train(series: Sequence[Series], plan: Plan, session: ExperimentSession, executor: Executor | None = None) -> None:
    """Train and measure what is missing, with progress bars."""
    from atdiag.execution.run import execute
    from atdiag.reports import console
    from atdiag.study import pipeline

    remember(series, session.store, bool(plan.todo))
    if plan.todo:
        _inform(plan, session)
        with console.training(len(plan.specs), lambda: unfinished(plan, session.store)) as report:
            execute(plan.specs, session.store, session.options, report, executor or session.executor)
    with console.staged() as report:
        pipeline.measure(series, session.store, _measuring(session), report)


def remember(series: Sequence[Series], store: Store, trains: bool) -> None:
    """Record which experiments ask for which runs, for lists of runs. trains: whether some are trained now."""
    from atdiag.core import asked

    for one in series:
        arms: dict[str, list[str]] = {}
        for name, spec in planned(one):
            arms.setdefault(name, []).append(spec.id)
        asked.record(store, one.ablation, arms, trains)


def submit(series: Sequence[Series], plan: Plan, session: ExperimentSession) -> list[Submission]:
    """Submit what a cluster does not have in its queue yet, and return at once; what was submitted.

    Raises what :meth:`~atdiag.execution.slurm.SlurmExecutor.submit` raises.
    """
    from atdiag.execution import plan as plans
    from atdiag.execution.slurm import SlurmExecutor

    assert isinstance(session.executor, SlurmExecutor)
    _inform(plan, session)
    store = session.store
    store.root.mkdir(parents=True, exist_ok=True)
    remember(series, store, bool(plan.todo))
    todo = [spec for spec in plans.pending(plan.specs, store) if store.run(spec).state != "training"]
    jobs = plans.share_out(todo, session.executor.processes(session.options))
    session.executor.submit(jobs, store, session.options)
    return session.executor.submitted


def _inform(plan: Plan, session: ExperimentSession) -> None:
    """Tell a cluster's executor how fast its devices are taken to be, for time limits."""
    from atdiag.execution.slurm import SlurmExecutor

    if isinstance(session.executor, SlurmExecutor):
        session.executor.speed = plan.speed


def _measuring(session: ExperimentSession) -> str:
    """Return the device for what is measured here: a login node need not have the one that trains."""
    device = session.options.device
    return devices.resolve(None if session.on_cluster and device and not devices.is_here(device) else device)


def check(series: Sequence[Series], plan: Plan, session: ExperimentSession) -> None:
    """Raise UserError, before training, if something can't be trained or measured."""
    from atdiag.study import pipeline

    if not session.on_cluster:
        device = devices.resolve(plan.device)  # finished runs may still be measured
        devices.fit_ranks(session.options, device)
    if plan.todo:
        paths.fit_for_runs(session.store.root, "runs")
    pipeline.check(series, plan.todo)


def spread(make: Make, lab: Lab, leave_out: bool = False, spoken: Callable[[str], str] = str) -> Series:
    """Return an ablation's studies for the given teacher, for each of several (``a,b``), or for ``all``.

    For all teachers (with ``leave_out``: for several), those that the ablation refuses are left out, with a note in the
    series. Raises UserError for a refused teacher that was named, and if none is left.
    """
    from atdiag.study.protocol import Series

    asked = make.keywords.get("teacher")
    if not isinstance(asked, str | tuple) or (isinstance(asked, str) and asked != "all" and "," not in asked):
        return Series.join([make(lab if asked is None else lab.suited(asked))])
    names = asked if isinstance(asked, tuple) else lab.teachers if asked == "all" else references(asked)
    if len(names) == 1:
        return Series.join([make(lab.suited(names[0]), teacher=names[0])])
    series = Series.of_each(
        names, lambda name: make(lab.suited(name), teacher=name), leave_out=leave_out or asked == "all"
    )
    return replace(series, notes=tuple(map(spoken, series.notes)))  # why some teachers are left out


def references(text: str) -> tuple[str, ...]:
    """Split ``a,b`` into references to teachers, each once. An existing path is taken literally, including commas.

    Raises UserError if there are none, and for a comma with nothing before or after it.
    """
    from atdiag.core.selection import comma_separated

    rest = text.split(",")
    out: list[str] = []
    while rest:
        joined = (n for n in range(len(rest), 1, -1) if _is_file(",".join(rest[:n]).strip()))
        count = next(joined, 1)
        out.append(",".join(rest[:count]).strip())
        rest = rest[count:]
    found = tuple(dict.fromkeys(filter(None, out)))
    if found and not all(out):
        raise UserError(f"`teacher` {text!r} has a comma too many", f"type {','.join(found)}")
    return found or comma_separated(text, "teacher", "clip_b,deit_b")


def _is_file(reference: str) -> bool:
    from atdiag.networks.weights.sources import split_marks, split_reference

    name, file, _ = split_reference(reference)
    named = "," not in name and file is not None and file.exists()  # else its first part is a reference of its own
    return named or split_marks(reference)[0].exists()


def check_overrides(
    plan: Callable[[Lab], list[RunSpec]],
    specs: list[RunSpec],
    settings: Settings,
    sets: list[str],
    asked: Callable[[RunSpec], Hashable] = lambda spec: spec.id,
    unchanged: str = "none of this experiment's runs",
) -> None:
    """Raise UserError for a setting given with --set that changes none of the planned runs (``specs``).

    asked: what the command asks of a run; the runs themselves unless given. unchanged: how the message calls it.
    """
    from atdiag.study import settings as profiles
    from atdiag.study.builder import Lab

    known = {asked(spec) for spec in specs}
    for name in (item.partition("=")[0].strip() for item in sets):
        plain = profiles.without(settings, name)
        if plain is None or plain == settings.profile or _is_so(name, specs, settings):
            continue  # required, or equal to the default
        others = {key: value for key, value in settings.overrides.items() if key != name}
        try:
            without = plan(Lab(replace(settings, profile=plain, overrides=others)))
        except UserError:
            continue
        if known == {asked(spec) for spec in without}:
            raise UserError(f"{name} has no effect here: it changes {unchanged}", "leave it out")


def check_classes(several: Sequence[Series], settings: Settings) -> None:
    """Raise UserError for a list of classes if no teacher's own head is measured."""
    if settings.classes is not None and not any(
        study.reference and not study.reference.probed for one in several for study in one.studies
    ):
        raise UserError("`classes` has no effect here: no teacher's own head is measured", "leave it out")


def _is_so(name: str, specs: list[RunSpec], settings: Settings) -> bool:
    """Return whether a setting under ``transfer.`` has the value that some transfer already has."""
    section, _, field = name.partition(".")
    if section != "transfer":
        return False
    for spec in (spec for spec in specs if spec.transfer.method != "none"):
        own = spec.transfer
        if field in ("teacher_layers", "teacher_heads"):  # a rule that was asked for may be the default
            if getattr(own, field):
                return True
            continue
        if field not in type(own).model_fields:
            continue
        asked = settings.profile.transfer.transfer(own.method, spec.network.depth, spec.network.heads)
        if getattr(own, field) is not None and getattr(asked, field) == getattr(own, field):
            return True
        if field == "heads" and own.heads is None is asked.heads and own.takes_attention:
            return True
    return False


def unfinished(plan: Plan, store: Store) -> int:
    """Return how many runs of a plan are currently unfinished."""
    from atdiag.execution.plan import pending

    return len(pending(plan.specs, store))


def planned(series: Series) -> list[tuple[str, RunSpec]]:
    """Return every run once, with the name of the first arm that contains it."""
    several = len(series.studies) > 1
    named: dict[str, tuple[str, RunSpec]] = {}
    for study in series.studies:
        for arm in [*study.arms, *([study.reference] if study.reference else [])]:
            for spec in arm.every_spec:
                named.setdefault(spec.id, (f"{study.label}: {arm.name}" if several else arm.name, spec))
    return list(named.values())
