"""Diagnose a teacher: plan, look, ask, and write down. What the command and ``atdiag.diagnose`` share.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.api import experiments
from atdiag.api.results import Result, as_sets, data_sets, in_own_context
from atdiag.api.running import as_references
from atdiag.api.sessions import ExperimentSession, open_session
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.text import count
from atdiag.diagnosis.hypotheses import MARGIN
from atdiag.stats import sequential
from atdiag.study.profiles import OWN_PROFILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from atdiag.core.spec import RunSpec
    from atdiag.diagnosis.arms import Case, Train
    from atdiag.diagnosis.first_look import FirstLook
    from atdiag.diagnosis.planning import AnalysisPlan
    from atdiag.diagnosis.words import Advice, Said
    from atdiag.execution.executor import Executor
    from atdiag.reports.writers import Written
    from atdiag.study.builder import Lab
    from atdiag.study.own import Budget
    from atdiag.study.protocol import Series
    from atdiag.study.settings import Settings

SEEDS = ",".join(map(str, sequential.SEEDS))


@dataclass(frozen=True)
class Asked:
    """What is asked of a diagnosis, as typed."""

    teacher: str
    transfer: str = "copy"
    looks: str = SEEDS
    """Seeds of every arm at the planned looks."""
    margin: float = MARGIN

    def case(self, settings: Settings) -> Case:
        """Return the teacher with all that can be trained with it."""
        from atdiag.diagnosis import arms, planning

        return arms.case(planning.lab(settings, self.seeds), self.teacher, self.transfer, self.margin)

    @property
    def seeds(self) -> list[int]:
        """The looks as numbers. Raises UserError for what is no list of looks."""
        from atdiag.stats.contrasts import FEWEST_SEEDS
        from atdiag.stats.sequential import looks

        try:
            numbers = [int(part) for part in self.looks.split(",")]
            looks(numbers)
        except ValueError:
            raise UserError(
                f"`looks` {self.looks!r} is not a list of at most three increasing numbers of seeds",
                "write it as 5,8,12",
            ) from None
        if numbers[-1] < FEWEST_SEEDS:
            raise UserError(
                f"`looks` {self.looks} ends below {FEWEST_SEEDS} seeds, where verdicts begin", "write it as 5,8,12"
            )
        return numbers


@dataclass(frozen=True)
class PreparedDiagnosis:
    """A planned diagnosis."""

    asked: Asked
    plan: AnalysisPlan
    session: ExperimentSession

    @property
    def case(self) -> Case:
        """The teacher with all that can be trained with it."""
        return self.plan.case

    @property
    def series(self) -> Series:
        """The experiment whose arms are asked about first."""
        from ablations.benchmark import benchmark
        from atdiag.study.protocol import Series

        return Series.join([benchmark(self.case.lab, self.asked.teacher, "copy,distill")])

    @property
    def folder(self) -> Path:
        """Where the results go by default."""
        from atdiag.reports import document

        return Path("results") / f"diagnose-{document.plain(self.case.teacher.name)}-{self.plan.stem}"


def prepare(
    asked: Asked, sets: Sequence[str], budget: str | None = None, gpu: str | None = None, **given: Any
) -> PreparedDiagnosis:
    """Plan a diagnosis. Raises UserError for any invalid option.

    budget: a time. It leaves out looks that do not fit; of a user's own images it also chooses the epochs, so that
    every question fits at the first look. given: the other options of :func:`~atdiag.api.sessions.open_session`.
    """
    from atdiag.diagnosis import planning
    from atdiag.networks.registry import teachers
    from atdiag.study.own import Budget

    wanted = Budget.parse(budget, gpu)
    if gpu is not None:
        given["device"] = given.get("device") or "cuda"
    seeds = asked.seeds
    if len(named := experiments.references(asked.teacher)) > 1:
        raise UserError(f"diagnose takes one teacher at a time, not {', '.join(named)}", "type one of them")
    session = open_session(set_=list(sets), seeds=None, equivalence=None, **given)
    teachers.glance(asked.teacher, session.settings.profile.name, session.settings.profile.data.image_size)
    session = _fitted(asked, session, wanted)
    case = asked.case(session.settings)
    seconds = None if wanted is None else wanted.seconds
    plan = planning.make(case, session.plan, seeds, seconds)

    def every(lab: Lab) -> list[RunSpec]:
        return specs(replace(case, lab=lab))

    experiments.check_overrides(every, specs(case), case.lab.settings, list(sets))
    return PreparedDiagnosis(asked, plan, session)


def specs(case: Case) -> list[RunSpec]:
    """Return all runs that may be asked about."""
    from atdiag.diagnosis.planning import arms

    return [spec for arm in arms(case) for spec in case.arm(arm).specs]


def _fitted(asked: Asked, session: ExperimentSession, budget: Budget | None) -> ExperimentSession:
    """Return the session with what is chosen for the teacher, and for a budget of a user's own images."""
    from atdiag.diagnosis.planning import arms
    from atdiag.study import own

    if session.settings.profile.name != OWN_PROFILE:
        return session
    session = replace(session, settings=own.suited(session.settings, asked.teacher))
    if budget is None:
        return session

    def planned(settings: Settings) -> list[RunSpec]:
        case = asked.case(settings)
        return [spec for arm in arms(case, together=True) for spec in case.arm(arm).specs[: asked.seeds[0]]]

    settings, choice = own.within(session.settings, budget, planned, session.store, session.options)
    return replace(session, settings=settings, choice=choice)


def check(ready: PreparedDiagnosis, folder: Path | None) -> None:
    """Raise UserError, before training, if something can't be trained or written, or if another plan is there."""
    if folder is not None:
        paths.writable(folder, "out")
    experiments.check([ready.series], ready.session.plan(ready.plan.todo), ready.session)


def look(ready: PreparedDiagnosis, train: Train) -> FirstLook:
    """Look at the teacher and the images; the teacher itself is evaluated, and nothing is trained."""
    from atdiag.analysis import subjects
    from atdiag.diagnosis import first_look
    from atdiag.diagnosis.arms import Runs

    settings = ready.case.lab.settings
    subject = subjects.find(ready.asked.teacher, settings.profile.name, settings.profile.data)
    return first_look.look(ready.case, subject, Runs(ready.case, ready.session.store, train).teacher())


def answer(
    ready: PreparedDiagnosis,
    seen: FirstLook,
    train: Train,
    folder: Path | None,
    typed: Callable[[Advice], str],
    spoken: Callable[[str], str] = str,
) -> tuple[Result, Said]:
    """Ask the questions, training what is missing, and write the report if a folder is given.

    typed: formats an advice with its line to type. spoken: spells the arguments that are named in texts.
    """
    import pandas as pd

    from atdiag.diagnosis import asking, document, words
    from atdiag.diagnosis.arms import Runs
    from figures import diagnosis as figures

    runs = Runs(ready.case, ready.session.store, train)
    found = asking.ask(ready.case.outline, ready.plan.looks, runs.answers, runs.footing, runs.teacher())
    said = words.say(ready.plan, found)
    content = document.as_json(ready.plan, found, said, runs, seen)

    def draw() -> Figure:
        title = f"diagnose, {ready.case.teacher.label}, {ready.case.transfer}, {count(found.last.look.seeds, 'seed')}"
        return figures.diagnosis(title, document.rows(ready.plan, found), ready.case.margin)

    written = None if folder is None else _write(folder, content, said, draw, typed, spoken)
    table = pd.DataFrame([_flat(row) for row in content["arms"]])
    used = dict.fromkeys(run for row in content["arms"] for run in row["runs"])
    places = tuple(ready.session.store.root / run for run in used)
    notes = (*map(typed, said.advice), *map(spoken, said.others))
    return Result("diagnose", table, said.headline, places, notes, content, found, {"": draw}, written), said


def _write(
    folder: Path,
    content: Mapping[str, Any],
    said: Said,
    draw: Callable[[], Figure],
    typed: Callable[[Advice], str],
    spoken: Callable[[str], str],
) -> Written:
    from atdiag.diagnosis import html
    from atdiag.reports import drawing, writers

    with drawing.defaults():
        page = html.page(content, said, draw(), typed, spoken)
    return writers.write(folder, "report", {"html": page}, content, {"": draw})


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an arm's row for a table: the contrast in columns of its own."""
    contrast = row["contrast"] or dict.fromkeys(("points", "ci_low", "ci_high", "p"))
    numbers = {name: contrast[name] for name in ("points", "ci_low", "ci_high", "p")}
    return {"arm": row["arm"], "top1": row["top1"], **numbers, "seeds": row["seeds"], "runs": " ".join(row["runs"])}


@in_own_context
def diagnose(
    teacher: str | Path | nn.Module,
    data: str | Path | Mapping[str, Any] | None = None,
    *,
    transfer: str = "copy",
    looks: str | Sequence[int] = SEEDS,
    margin: float = MARGIN,
    budget: str | None = None,
    gpu: str | None = None,
    split: float | None = None,
    profile: str | None = None,
    first_seed: int | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
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
) -> Result:
    """Answer whether a teacher's attention transfers, if not why, and what to change::

        answer = atdiag.diagnose("clip_b")
        answer.verdict, answer.notes, answer.found.causes

    The same as ``atdiag diagnose``, on the same runs: ``.found`` is a
    :class:`~atdiag.diagnosis.asking.Conclusion`, ``.document`` the content of ``report.json``. out: a folder for the
    plan and the report; default: neither is written. dry_run: train nothing; ``.document`` is the plan. The other
    arguments are those of :func:`atdiag.run`.

    Raises UserError for wrong input, with nothing written, and FaultError if a training fails.
    """
    places = {"runs": runs, "data_dir": data_dir, "classes": classes}
    given: dict[str, Any] = {name: None if path is None else Path(path) for name, path in places.items()}
    given |= {"profile": profile, "first_seed": first_seed, "split": split}
    given |= {
        "device": device,
        "micro_batch": micro_batch,
        "deterministic": deterministic,
        "ranks": ranks,
        "track": track,
    }
    given["data"] = str(data) if isinstance(data, str | Path) else None
    sets = [*(data_sets(data) if isinstance(data, Mapping) else []), *as_sets(settings)]
    typed = looks if isinstance(looks, str) else ",".join(map(str, looks))
    folder = None if out is None else Path(out).expanduser()
    with contextlib.ExitStack() as stored:
        references = as_references(teacher, given["runs"], stored)
        (name,) = (references,) if isinstance(references, str) else references
        ready = prepare(Asked(name, transfer, typed, margin), sets, budget, gpu, **given)
        if dry_run:
            return _planned(ready)
        check(ready, folder)
        stored.pop_all()  # what is trained with is kept
    if folder is not None:
        ready.plan.write(folder)
    trained = partial(train, ready, executor=executor)
    result, _ = answer(ready, look(ready, trained), trained, folder, lambda one: one.text)
    return result


def _planned(ready: PreparedDiagnosis) -> Result:
    import pandas as pd

    document = ready.plan.document()
    store = ready.session.store
    rows = [
        {"arm": arm, "run": run, "state": store.run(spec).state}
        for arm, ids in document["runs"].items()
        for run, spec in zip(ids, ready.case.arm(arm).specs, strict=True)
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    return Result("diagnose", table, "", tuple(store.root / row["run"] for row in rows), (), document, ready.plan)


def train(ready: PreparedDiagnosis, todo: Sequence[RunSpec], executor: Executor | None = None) -> None:
    """Train what is missing, with a progress bar."""
    from atdiag.core import asked

    asked.record(ready.session.store, "diagnose", {"": [spec.id for spec in todo]})
    experiments.train([], ready.session.plan(todo), ready.session, executor)
