"""The protocol of every experiment: options -> arms -> contrasts -> claims, verdict.

An ablation is a function from a :class:`Lab` and its own options to a :class:`Study`: the arms, the contrasts between
them that answer the question, and a sentence that states the answer. Studies that differ in one thing (teacher, size,
length, data set) are read together as a :class:`Series`. Nothing here trains: ``execution`` does that, and
``aggregate`` reads the results from run directories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from atdiag.core.errors import UserError
from atdiag.core.spec import RunSpec, Teacher
from atdiag.networks.registry.specimens import is_specimen, specimen
from atdiag.study import other_size

if TYPE_CHECKING:
    from atdiag.core.runs import Run
    from atdiag.networks.weights.classes import HeadRows
    from atdiag.stats.contrasts import Estimate, Scale
    from atdiag.study.claims import Claim, Judged

METHODS = ("copy", "distill")
"""The transfers of attention."""


BASELINE = "scratch"
"""Name of the baseline arm: the standard student, trained from scratch with no transfer."""


@dataclass(frozen=True)
class EqualAccuracy:
    """Runs of which one is taken for each seed: that whose accuracy on the validation part is nearest another run's."""

    candidates: tuple[tuple[RunSpec, ...], ...]
    """For each seed; of equally near ones the first is taken."""
    to: tuple[RunSpec, ...]
    """The run that they are compared with, for each seed."""


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment, over its seeds."""

    name: str
    specs: tuple[RunSpec, ...]
    head: HeadRows | None = None
    """For the teacher itself: the rows of its head that are the data set's classes, and how they were determined."""
    partners: tuple[RunSpec, ...] = ()
    """For an ensemble: for each of ``specs`` the run whose class probabilities are averaged with its own."""

    equal: EqualAccuracy | None = None
    """How its runs are chosen among several once these are finished; ``specs`` are then any of them."""

    @property
    def every_spec(self) -> tuple[RunSpec, ...]:
        """All runs that it depends on."""
        further = () if self.equal is None else tuple(spec for some in self.equal.candidates for spec in some)
        return (*self.specs, *self.partners, *further)

    @property
    def probed(self) -> bool:
        """Whether this is the teacher itself with a linear probe for a head."""
        return self.specs[0].init.probe


@dataclass(frozen=True)
class Contrast:
    """A linear combination of arms, in top-1 points or in log-odds."""

    name: str
    weights: Mapping[str, float]
    scale: Scale = "points"


class Measurement(Protocol):
    """A measurement of finished runs besides their test predictions: taken once, and stored in their directories."""

    @property
    def name(self) -> str:
        """Short name, such as "test on gaussian_noise"."""

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError, before training, if these runs could not be measured."""

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that have not been measured."""

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Take the measurement and store it in the runs' directories. on_progress: callback (done, total)."""

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return the measurement's numbers for tables, by column, to be averaged over an arm's runs; may be empty."""


@dataclass(frozen=True)
class Study:
    """A planned experiment. The first arm is the baseline; every other arm is always contrasted with it."""

    ablation: str
    teacher: Teacher
    options: Mapping[str, str]
    arms: tuple[Arm, ...]
    contrasts: tuple[Contrast, ...]
    """Contrasts besides arm minus baseline; the first is the contrast of interest."""
    verdict: Callable[[Report], str]
    figure: str = "contrasts"
    """Figure of this study alone, from a :class:`Report`: an entry point of ``atdiag.figures``."""
    together: str = "gains"
    """Figure of several such studies, from a :class:`Reading`: an entry point."""
    label: str = ""
    """Label that distinguishes the study within a series; default: the teacher's."""
    test_set: str | None = None
    """Test set to evaluate on, if not the test images of its own data set."""
    measures: tuple[Measurement, ...] = ()
    claims: tuple[Claim, ...] = ()
    """Claims of papers about this experiment."""
    reference: Arm | None = None
    """The teacher itself, for its own accuracy."""
    notes: tuple[str, ...] = ()
    """Notes for readers on how the arms were made."""
    curve: Mapping[str, int] = field(default_factory=dict)
    """Arm -> its position on the horizontal axis, for a figure that has one."""
    subject: str = ""
    """Who teaches, for a title, where a study compares several teachers; by default its ``teacher``."""
    short_on_purpose: bool = False
    """Whether the study varies training length: a baseline near chance is then reported, but keeps its verdicts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.teacher.label)
        object.__setattr__(self, "subject", self.subject or self.teacher.label)
        notes = list(self.notes)
        if differences := self.teacher.network.differences:
            notes.append(f"{self.teacher.label} also has {', '.join(differences)}, which no student here is given.")
        if is_specimen(self.teacher):
            fault = specimen(self.teacher.name).planted
            notes.append(
                f"{self.teacher.label} is a specimen (planted: {fault}). It stands for no published family, and no "
                "claim of a paper is judged by it."
            )
        planned = [arm.specs[0] for arm in self.arms if arm.specs]
        if planned and (size := other_size.option(planned[0].network, self.teacher.network)):
            object.__setattr__(self, "options", {**self.options, "student": size})
            if self.claims:
                notes.append("No claim of a paper is judged: the papers' students have their teacher's size.")
        notes += other_size.notes(planned)
        notes += [
            f"{', '.join(names[:-1])} and {names[-1]} are the same runs here: "
            f"one condition under {len(names)} names, counted once."
            for names in self._names_by_runs().values()
            if len(names) > 1
        ]
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))
        for arm in self.arms[1:]:
            _comparable(self.arms[0], arm)

    @property
    def of_one_size(self) -> bool:
        """Whether the students have their teacher's size, as in the papers."""
        return not other_size.option(self.arms[0].specs[0].network, self.teacher.network)

    def _names_by_runs(self) -> dict[tuple[str, ...], list[str]]:
        """Return the ids of runs -> the arms that consist of them."""
        names: dict[tuple[str, ...], list[str]] = {}
        for arm in self.arms:
            names.setdefault(tuple(spec.id for spec in arm.every_spec), []).append(arm.name)
        return names

    @property
    def specs(self) -> list[RunSpec]:
        """All runs, each once, in the order of arms."""
        arms = [*self.arms, *([self.reference] if self.reference else [])]
        return list({spec.id: spec for arm in arms for spec in arm.every_spec}.values())


LEFT_OUT = "Left out: "
"""Prefix of a note that names what an ablation refuses."""


@dataclass(frozen=True)
class Series:
    """Studies that are read together. Each has its own baseline; they differ from each other in one thing."""

    ablation: str
    studies: tuple[Study, ...]
    figure: str = ""
    """Figure of all of them, from a :class:`Reading`; empty: the one that the studies name."""
    verdict: Callable[[Sequence[Report]], str] | None = None
    """Joint verdict; None: the studies' verdicts in sequence."""
    findings: Callable[[Sequence[Report]], Sequence[Judged]] | None = None
    """Verdicts on claims that are not about one contrast of each study."""
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> list[RunSpec]:
        """All runs of all studies, each once."""
        return list({spec.id: spec for study in self.studies for spec in study.specs}.values())

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Claims of papers about these studies, each once."""
        return tuple(dict.fromkeys(claim for study in self.studies for claim in study.claims))

    @staticmethod
    def of_each(names: Iterable[str], make: Callable[[str], Study | Series], leave_out: bool) -> Series:
        """Return the studies that ``make`` builds for some names; with ``leave_out``, refused ones become a note.

        Otherwise, or if none is left, raises the UserError of the first refusal.
        """
        parts: list[Study | Series] = []
        refused: list[UserError] = []
        for name in names:
            try:
                parts.append(make(name))
            except UserError as fault:
                if not leave_out:
                    raise
                refused.append(fault)
        if not parts:
            raise refused[0]
        series = Series.join(parts)
        return replace(series, notes=(*series.notes, *(f"{LEFT_OUT}{fault}." for fault in refused)))

    @staticmethod
    def join(parts: Sequence[Study | Series]) -> Series:
        """Join studies and series of one ablation into one series.

        Raises UserError for a study without a baseline and another arm, ValueError without any study.
        """
        many = [part for part in parts if isinstance(part, Series)]
        studies = tuple(s for part in parts for s in ([part] if isinstance(part, Study) else part.studies))
        for study in studies:
            if len(study.arms) < 2:
                raise UserError(
                    f"{study.ablation} of {study.label} has no arm to contrast with a baseline",
                    "give arms=(lab.baseline(source), ...), the baseline first",
                )
        if many:
            return replace(many[0], studies=studies)
        if not studies:
            raise ValueError("a series needs at least one study")
        return Series(studies[0].ablation, studies, figure=studies[0].together if len(studies) > 1 else "")


@dataclass(frozen=True)
class ArmResult:
    """Results of an arm. ``contrast`` is arm minus baseline (None for the baseline and the reference)."""

    arm: str
    top1: float
    seeds: int
    runs: tuple[str, ...]
    contrast: Estimate | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Further measurements by column, averaged over the arm's runs."""
    by_run: tuple[Mapping[str, float], ...] = ()
    """The same for each of ``runs``, in their order."""
    classes: tuple[int, ...] = ()
    """Number of different classes that each of ``runs`` predicts."""

    def contrast_or_raise(self) -> Estimate:
        """Return the contrast with the baseline; raise ValueError for the baseline itself."""
        if self.contrast is None:
            raise ValueError(f"{self.arm} is not contrasted with the baseline")
        return self.contrast


@dataclass(frozen=True)
class Footing:
    """How far a baseline is above chance, in per cent of the test images."""

    chance: float
    low: float
    """The lower limit of the baseline's accuracy."""
    needed: float
    """The value that ``low`` must reach."""
    classes: int
    """Number of classes among the test labels."""

    @property
    def undertrained(self) -> bool:
        """Whether the baseline is too near chance."""
        return self.low < self.needed


@dataclass(frozen=True)
class Report:
    """Results and conclusions of a finished study."""

    study: Study
    profile: str
    rows: tuple[ArmResult, ...]
    contrasts: Mapping[str, Estimate]
    reference: ArmResult | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's overrides of the profile, by dotted name."""
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm -> the teacher's weights without a counterpart in the student that started from it."""
    weights: tuple[str, ...] = ()
    """Which weights of the teacher's file were taken, if it holds several."""
    head_warning: str = ""
    """A warning if the reference is no better than chance and the order of its head's classes is assumed."""
    verdict: str = ""
    footing: Footing | None = None
    """How far the baseline is above chance; None: not checked."""

    @property
    def weak(self) -> bool:
        """Whether the teacher itself is below the baseline, which makes any transfer look like a failure."""
        return self.reference is not None and self.reference.top1 < self.rows[0].top1

    @property
    def undertrained(self) -> bool:
        """Whether the baseline is so near chance that no conclusion is possible."""
        return self.footing is not None and self.footing.undertrained and not self.study.short_on_purpose

    @property
    def estimates(self) -> list[tuple[str, Estimate]]:
        """All contrasts by name: each arm minus the baseline, then the further ones."""
        arms = [(row.arm, row.contrast) for row in self.rows if row.contrast is not None]
        return [*arms, *self.contrasts.items()]

    def made_of(self, name: str) -> tuple[str | None, frozenset[tuple[tuple[str, ...], float]], Scale]:
        """Return what defines a contrast: its test set, its runs with their weights, and its scale.

        A contrast between arms that are the same runs has no runs: it is zero by construction.
        """
        runs = {row.arm: row.runs for row in self.rows}
        asked = {contrast.name: contrast for contrast in self.study.contrasts}
        one = asked.get(name) or Contrast(name, {name: 1, self.rows[0].arm: -1})
        total: dict[tuple[str, ...], float] = {}
        for arm, weight in one.weights.items():
            total[runs[arm]] = total.get(runs[arm], 0) + weight
        made = frozenset((run, weight) for run, weight in total.items() if abs(weight) > 1e-9)
        return self.study.test_set, made, one.scale

    def row(self, arm: str) -> ArmResult:
        """Return the row of an arm."""
        return next(row for row in self.rows if row.arm == arm)


@dataclass(frozen=True)
class Reading:
    """A finished series: its studies' reports, the verdicts on papers' claims, and the conclusion."""

    series: Series
    reports: tuple[Report, ...]
    judged: tuple[Judged, ...]
    verdict: str

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs on which all its numbers are based."""
        rows = [row for report in self.reports for row in (*report.rows, report.reference) if row]
        return tuple(dict.fromkeys(run for row in rows for run in row.runs))


def _comparable(baseline: Arm, arm: Arm) -> None:
    """Raise UserError if an arm can't be contrasted with a baseline: other test images, or no common seed.

    An image and the same one turned are one image: their answers are paired.
    """

    def tested(one: Arm) -> set[str]:
        return {s.data.only_tested().model_copy(update={"turns": 0}).model_dump_json() for s in one.specs}

    if tested(arm) != tested(baseline):
        on = [", ".join(sorted({spec.data.name for spec in one.specs})) for one in (arm, baseline)]
        raise UserError(
            f"the arms {arm.name!r} (on {on[0]}) and {baseline.name!r} (on {on[1]}) "
            "are not measured on the same images",
            "give each data set a study with a baseline of its own",
        )
    if not {spec.seed for spec in arm.specs} & {spec.seed for spec in baseline.specs}:
        raise UserError(
            f"the arms {arm.name!r} and {baseline.name!r} have no seed in common, so nothing can be paired",
            "make both with the same lab",
        )
