"""The protocol that every experiment follows: options -> arms -> contrasts -> claims, verdict.

An ablation is a function from a :class:`Lab` and its own options to a :class:`Study`: which arms there are, which of
their contrasts answer the question, and how the answer is put in a sentence. Studies that differ in one thing (teacher,
size, length, data set) are read together as a :class:`Series`. Nothing here trains; ``schedule`` does that, and
``reading`` reads what came out of the run directories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from atdiag.core.errors import UserError
from atdiag.core.spec import RunSpec, Teacher

if TYPE_CHECKING:
    from atdiag.core.runs import Run
    from atdiag.stats.contrasts import Estimate
    from atdiag.study.claims import Claim, Judged

METHODS = ("copy", "distill")
"""The transfers of attention."""


BASELINE = "scratch"
"""Name of the baseline arm: the standard student, trained from scratch with no transfer."""


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment, over its seeds."""

    name: str
    specs: tuple[RunSpec, ...]


@dataclass(frozen=True)
class Contrast:
    """A linear combination of arms, in top-1 points."""

    name: str
    weights: Mapping[str, float]


class Measurement(Protocol):
    """What is taken of finished runs beside their own test predictions: once, and kept in their directories."""

    @property
    def name(self) -> str:
        """What is taken, in a few words, such as "test on gaussian_noise"."""

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError, before anything is trained, where it could not be taken of these runs."""

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those of which it has not been taken."""

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Take it, and write it into the runs' directories. on_progress: callback (done, total)."""

    def numbers(self, run: Run) -> Mapping[str, float]:
        """What a table shows of it, by column, in the mean over an arm's runs; empty for nothing."""


@dataclass(frozen=True)
class Study:
    """A planned experiment. The first arm is the baseline; every other arm is contrasted with it anyway."""

    ablation: str
    teacher: Teacher
    options: Mapping[str, str]
    arms: tuple[Arm, ...]
    contrasts: tuple[Contrast, ...]
    """What is asked beyond arm minus baseline; the first is the contrast of interest."""
    verdict: Callable[[Report], str]
    figure: str = "contrasts"
    """Of this study alone: an entry point of ``atdiag.figures``, from a :class:`Report`."""
    together: str = "gains"
    """Of several such studies: an entry point, from a :class:`Reading`."""
    label: str = ""
    """What tells it from the others of a series; the teacher's, if nothing is given."""
    test_set: str | None = None
    """The images that it is measured on, where they are not the test images of its own data set."""
    measures: tuple[Measurement, ...] = ()
    claims: tuple[Claim, ...] = ()
    """What a paper says of this experiment."""
    reference: Arm | None = None
    """The teacher as it is, for its own accuracy."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how the arms were made."""
    curve: Mapping[str, int] = field(default_factory=dict)
    """Arm -> its place on the horizontal axis, for a figure that draws one."""
    short_on_purpose: bool = False
    """The length of training is what is studied: a baseline near chance is said, and takes no verdict away."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.teacher.label)
        if differences := self.teacher.network.differences:
            said = f"{self.teacher.label} also has {', '.join(differences)}, which no student here is given."
            object.__setattr__(self, "notes", (*self.notes, said))
        for arm in self.arms[1:]:
            _comparable(self.arms[0], arm)

    @property
    def specs(self) -> list[RunSpec]:
        """All runs, each once, in the order of arms."""
        arms = [*self.arms, *([self.reference] if self.reference else [])]
        return list({spec.id: spec for arm in arms for spec in arm.specs}.values())


LEFT_OUT = "Left out: "
"""How a note begins that names what an ablation refuses."""


@dataclass(frozen=True)
class Series:
    """Studies that are read together. Each has its own baseline; between them one thing differs."""

    ablation: str
    studies: tuple[Study, ...]
    figure: str = ""
    """Of all of them, from a :class:`Reading`; none: what the studies themselves name."""
    verdict: Callable[[Sequence[Report]], str] | None = None
    """What they say together; None: what each says, one after another."""
    findings: Callable[[Sequence[Report]], Sequence[Judged]] | None = None
    """Verdicts on claims that are about something else than one contrast of each study."""
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> list[RunSpec]:
        """All runs of all studies, each once."""
        return list({spec.id: spec for study in self.studies for spec in study.specs}.values())

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What papers say of these studies, each once."""
        return tuple(dict.fromkeys(claim for study in self.studies for claim in study.claims))

    @staticmethod
    def of_each(names: Iterable[str], make: Callable[[str], Study | Series], leave_out: bool) -> Series:
        """The studies that ``make`` gives for some names; with ``leave_out`` those that it refuses are told in a note.

        Raises the UserError of the first that is refused, where none may be, or none is left.
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
        """Studies and series of one ablation as one series.

        Raises UserError for a study without a baseline and another arm, ValueError where there are no studies.
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
            raise ValueError("a series needs a study at least")
        return Series(studies[0].ablation, studies, figure=studies[0].together if len(studies) > 1 else "")


@dataclass(frozen=True)
class ArmResult:
    """An arm as measured. ``contrast`` is arm minus baseline (None for the baseline and the reference)."""

    arm: str
    top1: float
    seeds: int
    runs: tuple[str, ...]
    contrast: Estimate | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What else was measured, in the mean over its runs, by column."""
    by_run: tuple[Mapping[str, float], ...] = ()
    """The same of each of ``runs``, in their order."""
    classes: tuple[int, ...] = ()
    """How many different classes each of ``runs`` predicts."""

    def contrast_or_raise(self) -> Estimate:
        """The contrast with the baseline; ValueError for the baseline itself."""
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
    """What ``low`` has to reach."""
    classes: int
    """How many there are among the test labels."""

    @property
    def undertrained(self) -> bool:
        """Whether the baseline is too near chance."""
        return self.low < self.needed


@dataclass(frozen=True)
class Report:
    """A finished study: what was measured, and what follows."""

    study: Study
    profile: str
    rows: tuple[ArmResult, ...]
    contrasts: Mapping[str, Estimate]
    reference: ArmResult | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's overrides of the profile, by dotted name."""
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm -> the teacher's weights that had no place in the student that started from it."""
    verdict: str = ""
    footing: Footing | None = None
    """How far the baseline is above chance; None: it was not looked at."""

    @property
    def undertrained(self) -> bool:
        """Whether the baseline is so near chance that nothing can be said."""
        return self.footing is not None and self.footing.undertrained and not self.study.short_on_purpose

    @property
    def estimates(self) -> list[tuple[str, Estimate]]:
        """Every contrast by name: each arm minus the baseline, then what is asked beyond."""
        arms = [(row.arm, row.contrast) for row in self.rows if row.contrast is not None]
        return [*arms, *self.contrasts.items()]

    def made_of(self, name: str) -> tuple[str | None, frozenset[tuple[tuple[str, ...], float]]]:
        """What a contrast is made of: on which images, which runs with which weights."""
        runs = {row.arm: row.runs for row in self.rows}
        asked = {contrast.name: contrast.weights for contrast in self.study.contrasts}
        weights: Mapping[str, float] = asked.get(name) or {name: 1, self.rows[0].arm: -1}
        return self.study.test_set, frozenset((runs[arm], weight) for arm, weight in weights.items() if weight)

    def row(self, arm: str) -> ArmResult:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm == arm)


@dataclass(frozen=True)
class Reading:
    """A finished series: the reports of its studies, what became of the papers' claims, and what follows."""

    series: Series
    reports: tuple[Report, ...]
    judged: tuple[Judged, ...]
    verdict: str

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that all its numbers stand on."""
        rows = [row for report in self.reports for row in (*report.rows, report.reference) if row]
        return tuple(dict.fromkeys(run for row in rows for run in row.runs))


def _comparable(baseline: Arm, arm: Arm) -> None:
    """Raise UserError where an arm can't be contrasted with a baseline: other test images, or no seed in common."""

    def tested(one: Arm) -> set[str]:
        return {s.data.model_copy(update={"train": 1, "per_class": None}).model_dump_json() for s in one.specs}

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
