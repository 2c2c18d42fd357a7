"""The analysis plan: written down before the first run, with what each outcome would be called and what it costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.runs import write_atomically
from atdiag.core.text import count, duration
from atdiag.diagnosis.asking import FRESH
from atdiag.stats import sequential
from atdiag.stats.contrasts import FEWEST_SEEDS
from atdiag.study.builder import Lab
from atdiag.study.settings import SEEDS, Settings

if TYPE_CHECKING:
    from atdiag.core.spec import RunSpec
    from atdiag.diagnosis.arms import Case
    from atdiag.execution.plan import Plan

OUTCOMES = {
    "transfers": "the student with transfer is clearly above scratch, at the level of a look",
    "fails": "it is clearly below scratch, or not clearly above and a cause is accused",
    "no difference": "at the last look, within the margin of scratch by two one-sided tests",
    "undecided": "none of these after the last look",
    "undertrained": "scratch is too near chance for any contrast to be informative",
    "weak teacher": "the teacher is not above the upper limit of scratch: nothing is said of its architecture",
}
"""What each verdict means."""

RULES = (
    "Levels are shared by the looks (Bonferroni), and at each look by the accusations (Bretz et al. 2009).",
    "Whether the transfer helps or hurts has levels of its own, the same ones, two-sided.",
    "A single component is asked about only once the architecture is accused, halves of blocks only once these are.",
    f"Not accused is not cleared: that takes two one-sided tests within the margin. A sufficient set of components is "
    f"chosen by non-inferiority, and confirmed on {FRESH} seeds that were not used.",
)


@dataclass(frozen=True)
class AnalysisPlan:
    """What a diagnosis will do."""

    case: Case
    looks: tuple[sequential.Look, ...]
    todo: tuple[RunSpec, ...]
    """Unfinished runs of the first look's first question: does it transfer?"""
    seconds: float
    """Of these, by the clock."""
    most: float
    """Of everything, if every question is asked at every look."""

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON. It does not depend on what is finished."""
        outline, settings = self.case.outline, self.case.lab.settings
        graph = outline.graph
        return {
            "schema": "atdiag.diagnosis.plan/1",
            "teacher": self.case.teacher.label,
            "weights": self.case.teacher.weights,
            "transfer": self.case.transfer,
            "profile": settings.profile.name,
            "overrides": dict(sorted(settings.told.items())),
            "margin": self.case.margin,
            "looks": [{"seeds": look.seeds, "level": round(look.level, 6)} for look in self.looks],
            "first_seed": settings.seeds[0].data,
            "first_question": {"arms": list(outline.first), "asks": "does the transfer help, harm, or neither?"},
            "accusations": [
                {
                    "name": one.name,
                    "if_rejected": one.accuses,
                    "tests": [
                        {"contrast": dict(part.weights), "is": part.side, "points": part.bound} for part in one.parts
                    ],
                    "share_of_level": graph.shares[one.name],
                    "passes_share_to": dict(graph.edges[one.name]),
                }
                for one in outline.hypotheses.values()
            ],
            "not_asked": dict(outline.not_asked),
            "verdicts": OUTCOMES,
            "rules": list(RULES),
            "runs": {name: [spec.id for spec in self.case.arm(name).specs] for name in arms(self.case)},
        }

    @property
    def stem(self) -> str:
        """A name for the folder of results: the transfer, and a few digits of a hash of the plan."""
        text = json.dumps(self.document(), sort_keys=True)
        return f"{self.case.transfer}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

    def write(self, folder: Path) -> Path:
        """Write the plan into a folder, or find it there. Raises UserError if the folder holds another one."""
        path, text = folder / "plan.json", json.dumps(self.document(), indent=1) + "\n"
        if path.exists() and path.read_text() != text:
            raise UserError(f"{path} is the plan of another diagnosis", "give `out` another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
        return path


def arms(case: Case, together: bool = False) -> list[str]:
    """Return the names of all arms that may be asked about.

    together: only as many as one diagnosis may ask about: of two parts of the blocks at most one is accused, so
    bisection goes down a single way.
    """
    outline, names = case.outline, case.outline.names
    asked = list(outline.hypotheses)
    if together:
        parts, way = {*outline.parts}, {*outline.longest_way}
        asked = [name for name in asked if name in way or name not in parts]
    every = [arm for name in asked for arm in outline.hypotheses[name].arms]
    without = [names.given(other for other in outline.components if other != name) for name in outline.components]
    return list(dict.fromkeys([*outline.first, *every, *without]))


def make(
    case: Case,
    planned: Callable[[Sequence[RunSpec]], Plan],
    looks: Sequence[int] = sequential.SEEDS,
    budget: float | None = None,
) -> AnalysisPlan:
    """Plan a diagnosis.

    planned: plans runs, with their cost. looks: seeds at each look. budget: seconds by the clock; looks that do not fit
    are left out beforehand, down to a single one of three seeds, at which not every question need fit. Raises UserError
    for a budget that does not allow even the first question.
    """
    candidates = [tuple(looks[:n]) for n in range(len(looks), 0, -1)]
    if budget is not None and looks[0] > FEWEST_SEEDS:
        candidates.append((FEWEST_SEEDS,))
    plans = [_cost(case, planned, one) for one in (candidates if budget is not None else candidates[:1])]
    if budget is None:
        return plans[0]
    fitting = [plan for plan in plans if plan.most <= budget]
    if not fitting:  # the fewest seeds, and perhaps not every question
        fitting = [plan for plan in plans if plan.seconds <= budget][-1:]
    if not fitting:
        least = plans[-1]
        raise UserError(
            f"`budget` {duration(budget)} is too short for the first question alone: "
            f"{count(len(least.todo), 'run')} take about {duration(least.seconds)}",
            f"give at least that; every question may take {duration(least.most)}",
        )
    return fitting[0]


def _cost(case: Case, planned: Callable[[Sequence[RunSpec]], Plan], seeds: Sequence[int]) -> AnalysisPlan:
    outline = case.outline

    def specs(names: Sequence[str], seeds: range) -> list[RunSpec]:
        return [spec for name in names for spec in case.arm(name).specs[seeds.start : seeds.stop]]

    reference = [*case.reference.specs] if case.reference else []
    confirmed = [outline.names.native, outline.names.standard, *outline.names.singles[:1]] if outline.components else []
    every = specs(arms(case, together=True), range(seeds[-1])) + specs(confirmed, range(seeds[-1], seeds[-1] + FRESH))
    first = planned([*specs(outline.first, range(seeds[0])), *reference])
    whole = planned(list({spec.id: spec for spec in [*every, *reference]}.values()))
    return AnalysisPlan(case, sequential.looks(seeds), first.todo, first.seconds, whole.seconds)


def lab(settings: Settings, looks: Sequence[int]) -> Lab:
    """Return the lab with all seeds that a diagnosis may need, the fresh ones of a confirmation included."""
    first, needed = settings.seeds[0].data, looks[-1] + FRESH
    if first + needed > SEEDS:
        raise UserError(f"`first_seed` {first}", f"give a number from 0 to {SEEDS - needed}")
    seed = settings.seeds[0]
    seeds = tuple(seed.model_copy(update={"data": first + n, "model": first + n}) for n in range(needed))
    return Lab(replace(settings, seeds=seeds))
