"""The protocol that every experiment follows: options -> arms -> contrasts -> verdict.

An ablation is a function from a :class:`Lab` and its own options to a :class:`Study`: which arms there are, which of
their contrasts answer the question, and how the answer is put in a sentence. It trains nothing; ``schedule`` does that,
and :func:`report` reads what came out of the run directories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast
from zipfile import BadZipFile

from pydantic import ValidationError

from atdiag.data import names
from atdiag.networks import teachers
from atdiag.runs import DamagedRunError, Run, Store
from atdiag.spec import Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer, TransferMethod
from atdiag.study.profile import Settings, describe
from atdiag.words import UserError, suggest

if TYPE_CHECKING:
    from atdiag.study.contrast import Estimate, Outcomes

METHODS = ("copy", "distill")
"""The transfers of attention."""

_IMAGENET_CLASSES = 1000

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
    reference: Arm | None = None
    """The teacher as it is, for its own accuracy."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how the arms were made."""
    curve: Mapping[str, int] = field(default_factory=dict)
    """Arm -> its place on the horizontal axis, for a figure that draws one."""

    def __post_init__(self) -> None:
        if differences := self.teacher.network.differences:
            said = f"{self.teacher.label} also has {', '.join(differences)}, which no student here is given."
            object.__setattr__(self, "notes", (*self.notes, said))

    @property
    def specs(self) -> list[RunSpec]:
        """All runs, each once, in the order of arms."""
        arms = [*self.arms, *([self.reference] if self.reference else [])]
        return list({spec.id: spec for arm in arms for spec in arm.specs}.values())


@dataclass(frozen=True)
class Row:
    """An arm as measured. ``contrast`` is arm minus baseline (None for the baseline and the reference)."""

    arm: str
    top1: float
    seeds: int
    runs: tuple[str, ...]
    contrast: Estimate | None = None

    def contrast_or_raise(self) -> Estimate:
        """The contrast with the baseline; ValueError for the baseline itself."""
        if self.contrast is None:
            raise ValueError(f"{self.arm} is not contrasted with the baseline")
        return self.contrast


@dataclass(frozen=True)
class Report:
    """A finished study: what was measured, and what follows."""

    study: Study
    profile: str
    rows: tuple[Row, ...]
    contrasts: Mapping[str, Estimate]
    reference: Row | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's overrides of the profile, by dotted name."""
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm -> the teacher's weights that had no place in the student that started from it."""
    verdict: str = ""

    def row(self, arm: str) -> Row:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm == arm)


@dataclass(frozen=True)
class Lab:
    """What an ablation makes its arms with: the settings, and the field's constructions by name."""

    settings: Settings

    def teacher(self, name: str) -> Teacher:
        """A teacher at the profile, on the profile's images. Raises UserError if there is none.

        Where its published weights are not on this machine it is a plan (``sha256`` None), which can't be trained with.
        """
        return teachers.teacher(name, self.settings.profile.name, self.settings.profile.data.image_size)

    def student(self, teacher: Teacher, components: Iterable[str] = ()) -> Network:
        """The student's architecture: standard, with some of the teacher's native components, or with all."""
        components = tuple(components)
        for name in components:
            if name not in teacher.network.components:
                have = teacher.network.components
                raise UserError(
                    f"{teacher.label} has no component {name!r}{suggest(name, have)}",
                    f"it has {', '.join(have) or 'none'}",
                )
        return teacher.network.student(components, names.classes(self.settings.profile.data))

    def transfer(
        self, method: str, network: Network, layers: Sequence[int] | None = None, allowed: Sequence[str] = METHODS
    ) -> Transfer:
        """A transfer in the profile's form; ``layers`` are the blocks, where the experiment chooses them.

        Raises UserError for a method that is not allowed, and for a form that contradicts itself.
        """
        choose(method, allowed, "--transfer")
        try:
            return self.settings.profile.transfer.transfer(
                cast(TransferMethod, method), network.depth, network.heads, None if layers is None else tuple(layers)
            )
        except ValidationError as fault:
            raise UserError(describe(fault)) from None

    def arm(
        self,
        name: str,
        network: Network,
        teacher: Teacher | None = None,
        init: Init | None = None,
        transfer: Transfer | None = None,
        recipe: str | None = None,
    ) -> Arm:
        """An arm over the seeds of the settings.

        recipe: which of the profile's recipes it is optimised by; None: that of its transfer method.
        """
        profile = self.settings.profile
        transfer = transfer or Transfer()
        try:
            return Arm(
                name,
                tuple(
                    RunSpec(
                        network=network,
                        teacher=teacher,
                        init=init or Init(),
                        transfer=transfer,
                        data=profile.data,
                        recipe=profile.recipe[recipe or recipe_of(transfer)],
                        seed=seed,
                    )
                    for seed in self.settings.seeds
                ),
            )
        except ValidationError as fault:
            raise UserError(describe(fault)) from None

    def baseline(self, teacher: Teacher) -> Arm:
        """The standard student from scratch with no transfer: the same runs for every teacher of the same student."""
        return self.arm(BASELINE, self.student(teacher))

    def reference(self, teacher: Teacher) -> Arm | None:
        """The teacher as it is, with its own head, on the test images; None if its head is for another task.

        Of an ImageNet head, the rows of the data set's classes are taken, where those are ImageNet's.
        """
        data, network = self.settings.profile.data, teacher.network
        rows = names.imagenet_rows(data.name) if network.classes == _IMAGENET_CLASSES else ()
        own = not names.is_real(data.name) and network.classes == names.classes(data)
        if network.differences or not (rows or own):
            return None
        rows = () if len(rows) == network.classes else rows
        spec = RunSpec(
            network=network.model_copy(update={"classes": len(rows) or network.classes}),
            teacher=teacher,
            init=Init(source="teacher", head=True, head_rows=rows),
            data=data.model_copy(update={"train": 1, "per_class": None}),  # it is not trained
            recipe=Recipe(epochs=0, batch_size=1),
            seed=Seed(data=0, model=0),
        )
        return Arm("teacher", (spec,))


def recipe_of(transfer: Transfer) -> str:
    """Whose recipe a transfer is optimised by: the comparison losses by distillation's."""
    return transfer.method if transfer.method in ("copy", "none") else "distill"


def choose(value: str, allowed: Sequence[str], option: str) -> str:
    """``value`` if it is allowed. Raises UserError, with "did you mean", if not."""
    if value not in allowed:
        raise UserError(f"{option} {value!r}{suggest(value, allowed)} (choose from: {', '.join(allowed)})")
    return value


def outcomes(arm: Arm, store: Store) -> Outcomes:
    """What an arm's finished runs said of each test image, by seed."""
    import numpy as np

    from atdiag.study.contrast import Outcomes

    correct: dict[tuple[int, int], Any] = {}
    clusters = np.empty(0, np.int32)
    for spec in arm.specs:
        path = store.run(spec).predictions
        try:
            with np.load(path, allow_pickle=False) as saved:
                right = saved["prediction"] == saved["label"]
                clusters = saved["cluster"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as fault:
            raise DamagedRunError(path, type(fault).__name__) from None
        if abs(100 * right.mean() - store.run(spec).result()["top1"]) > 1e-6:
            raise DamagedRunError(path, "it does not agree with result.json")
        correct[spec.seed.data, spec.seed.model] = right
    return Outcomes(correct, clusters)


def report(study: Study, settings: Settings, store: Store) -> Report:
    """Read a study's finished runs and draw its conclusion. Every number comes from run directories.

    Raises ValueError where runs of different semantics would be compared.
    """
    from atdiag.study.contrast import estimate

    if len(versions := {spec.semantics for spec in study.specs}) > 1:
        raise ValueError(f"runs of different semantics can't be compared: {sorted(versions)}")
    measured = {arm.name: outcomes(arm, store) for arm in study.arms}
    baseline = study.arms[0].name
    rows = []
    for arm in study.arms:
        versus = None if arm.name == baseline else estimate(measured, {arm.name: 1, baseline: -1})
        rows.append(_row(arm, store, versus))
    asked = {c.name: estimate(measured, c.weights) for c in study.contrasts}
    reference = _row(study.reference, store) if study.reference else None
    dropped = {arm.name: names for arm in study.arms if (names := _dropped(store.run(arm.specs[0]).result()))}
    unsaid = Report(study, settings.profile.name, tuple(rows), asked, reference, settings.overrides, dropped)
    return replace(unsaid, verdict=" ".join(filter(None, (study.verdict(unsaid), _handicap(unsaid)))))


def _dropped(result: Mapping[str, Any]) -> tuple[str, ...]:
    """``blocks.3.attn.x`` and its likes as one ``blocks.*.attn.x``."""
    names = (result["start"] or {}).get("dropped", ())
    return tuple(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))


def _row(arm: Arm, store: Store, contrast: Estimate | None = None) -> Row:
    runs = [Run(store.root / spec.id) for spec in arm.specs]
    top1 = sum(run.result()["top1"] for run in runs) / len(runs)
    return Row(arm.name, top1, len(runs), tuple(run.id for run in runs), contrast)


def _handicap(report: Report) -> str:
    """A teacher weaker than the baseline makes any transfer look like a failure: say so."""
    if report.reference is None or report.reference.top1 >= report.rows[0].top1:
        return ""
    return (
        f"The teacher itself ({report.reference.top1:.1f} %) is below the baseline ({report.rows[0].top1:.1f} %): "
        "a failure here may be the teacher's weakness and says nothing about its architecture."
    )


def effect(estimate: Estimate) -> str:
    """An estimate in words: ``+3.1 points [1.2, 5.0]``."""
    return f"{estimate.value:+.1f} points [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def judge(estimate: Estimate, better: str, worse: str, same: str = "can't be told from noise", be: str = "is") -> str:
    """A verb phrase for an estimate, with its numbers; with one seed always "undecided".

    An interval that includes zero does not say that there is no effect, so no phrase says that.
    """
    if estimate.seeds < 2:
        return f"{be} undecided with one seed ({effect(estimate)}, images only)"
    phrase = same if not estimate.clear else better if estimate.value > 0 else worse
    few = ", too few to tell much" if estimate.seeds == 2 and not estimate.clear else ""
    return f"{phrase} ({effect(estimate)}, {estimate.seeds} seeds{few})"
