"""Does the outcome of a transfer go with the teacher's architecture, or with its pre-training?

The teachers of which Qin et al. 2026 report that their attention does not transfer differ from the others in both. Here
each architecture has two teachers, pre-trained in two ways: what differs between these two can't be the architecture,
and what two architectures have in common under both can't be the pre-training. All are copied by, or distilled into,
one standard student, at several training budgets.

- Of one architecture: the gain from the second teacher minus that from the first.
- Pre-training: the mean of this difference over architectures.
- Architecture: the mean gain from both teachers of an architecture, minus that of the first architecture.
- Interaction: an architecture's difference between its two teachers, minus the first architecture's.

The outcome is said to go with one of these where a contrast of its kind is clear of zero after Holm's correction, in
points and in log-odds with one sign. Each teacher's accuracy is that of a linear probe on the images that students see
at the largest budget. A teacher that is not clearly above the student from scratch is called too weak for a budget: a
failure to gain from it says nothing about either cause. A pair whose accuracies differ by more than two points is
called unmatched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from ablations.pace import TrainingBudget, budgets_of, budgets_option, under
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec import Teacher
from atdiag.core.text import count
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, METHODS, Arm, Contrast, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import agree, effect, no_verdict, odds, outcome

MINI = "1000x4,2500x4"
MATCHED = 2.0
"""Points by which the probes of a pair may differ."""


@dataclass(frozen=True)
class TeacherPair:
    """Two teachers of one architecture, with their names in tables."""

    name: str
    """Of the architecture: the first teacher's."""
    first: Teacher
    second: Teacher


@dataclass(frozen=True)
class Design:
    """What is compared: pairs of teachers, the names of their two kinds of pre-training, and methods."""

    pairs: tuple[TeacherPair, ...]
    kinds: tuple[str, str]
    methods: tuple[str, ...]

    @property
    def teachers(self) -> dict[tuple[str, str], Teacher]:
        """(Architecture, kind of pre-training) -> the teacher."""
        return {(p.name, kind): t for p in self.pairs for kind, t in zip(self.kinds, (p.first, p.second), strict=True)}

    def between(self, method: str, pair: str) -> str:
        """Return the name of the contrast of a pair's teachers."""
        return f"{method}: {self.kinds[1]} minus {self.kinds[0]}, {pair}"

    def pretraining(self, method: str) -> str:
        """Return the name of the contrast of the two kinds of pre-training; of a single pair it is that pair's."""
        if len(self.pairs) == 1:
            return self.between(method, self.pairs[0].name)
        return f"{method}: {self.kinds[1]} minus {self.kinds[0]}, mean"

    def architecture(self, method: str, pair: str) -> str:
        """Return the name of the contrast of an architecture with the first."""
        return f"{method}: {pair} minus {self.pairs[0].name}, mean"

    def interaction(self, method: str, pair: str) -> str:
        """Return the name of the contrast of two differences."""
        return f"{method}: {self.kinds[1]} minus {self.kinds[0]}, {pair} minus {self.pairs[0].name}"


@ablation(order=155, reproduce={}, papers=())
def source(
    lab: Lab,
    first: Annotated[
        str, typer.Option("--first", help="Teachers of one pre-training, such as dino_s or files; the plain one first.")
    ],
    second: Annotated[
        str, typer.Option("--second", help="In the same order, those of the same architectures, pre-trained otherwise.")
    ],
    kinds: Annotated[
        str, typer.Option("--kinds", help="Names of the two kinds of pre-training, such as supervised,mae.")
    ] = "first,second",
    methods: Annotated[str, typer.Option(help="Some of copy and distill.")] = "copy,distill",
    budgets: Annotated[str | None, budgets_option(MINI)] = None,
) -> Series:
    """Architecture or pre-training: what decides the transfer?"""
    lengths = budgets_of(lab, budgets, MINI)
    asked = comma_separated(methods, "methods", "copy,distill")
    for method in asked:
        choose(method, METHODS, "methods")
    named = comma_separated(kinds, "kinds", "supervised,mae")
    if len(named) != 2:
        raise UserError(f"`kinds` {kinds!r}: not two different names", "write them as 'supervised,mae'")
    design = Design(_pairs(lab, first, second), (named[0], named[1]), asked)
    longest = under(lab, lengths[-1])
    probes = tuple(longest.probe(arm_name(*key, "probe"), teacher) for key, teacher in design.teachers.items())
    studies = tuple(_study(under(lab, one), design, one, probes, one < lengths[-1]) for one in lengths)
    return Series("source", studies, figure="source")


def _pairs(lab: Lab, first: str, second: str) -> tuple[TeacherPair, ...]:
    """Return the pairs. Raises UserError for teachers that can't be compared."""
    for typed, name in ((first, "first"), (second, "second")):
        comma_separated(typed, name, "dino_s,dinov2_s")  # refuses an empty one
    ones, others = ([part.strip() for part in typed.split(",") if part.strip()] for typed in (first, second))
    if len(ones) != len(others):
        raise UserError(
            f"`first` names {len(ones)}, `second` {len(others)} of the teachers", "give both of each pair, in one order"
        )
    pairs: list[TeacherPair] = []
    for one, other in zip(ones, others, strict=True):
        a, b = lab.teacher(one), lab.teacher(other)
        if a.network.components != b.network.components or a.network.differences != b.network.differences:
            parts = (", ".join((*t.network.components, *t.network.differences)) or "no native part" for t in (a, b))
            raise UserError(
                f"{a.label} ({next(parts)}) and {b.label} ({next(parts)}) are of two architectures",
                "name teachers of one architecture at the same place of `first` and `second`",
            )
        if a.sha256 is not None and a.sha256 == b.sha256:
            raise UserError(f"{a.label} and {b.label} are the same weights", "name two teachers")
        pairs.append(TeacherPair(a.label.removesuffix(" (own file)"), a, b))
    if double := [p.name for i, p in enumerate(pairs) if p.name in [q.name for q in pairs[:i]]]:
        raise UserError(f"two teachers of `first` are called {double[0]}", "rename a file")
    student = lab.student(pairs[0].first)
    for pair in pairs:
        for teacher in (pair.first, pair.second):
            if lab.student(teacher) != student:
                raise UserError(
                    f"the standard students of {pairs[0].name} and {teacher.label} differ, as in their size or pixels",
                    "compare teachers of one size, or give all of them one student by `student`",
                )
    return tuple(pairs)


def arm_name(pair: str, kind: str, method: str) -> str:
    """Return the name of the arm of a method and a teacher; ``probe``: the teacher itself."""
    return f"{pair}, {kind}: {method}"


def _study(lab: Lab, design: Design, budget: TrainingBudget, probes: Sequence[Arm], short: bool) -> Study:
    origin = design.pairs[0].first
    student = lab.student(origin)
    arms = [lab.baseline(origin), *probes]
    for (pair, kind), teacher in design.teachers.items():
        for method in design.methods:
            passed = lab.transfer(method, student)
            arms.append(lab.arm(arm_name(pair, kind, method), student, teacher, transfer=passed))
    weights = {name: one for method in design.methods for name, one in _weights(design, method).items()}
    return Study(
        ablation="source",
        teacher=origin,
        options={"methods": ",".join(design.methods), "kinds": ",".join(design.kinds), "budget": str(budget)},
        arms=tuple(arms),
        contrasts=tuple(
            Contrast(name if scale == "points" else odds(name), one, scale)
            for name, one in weights.items()
            for scale in ("points", "log-odds")
        ),
        verdict=lambda report: _said(report, design),
        figure="source",
        label=str(budget),
        notes=_notes(design),
        subject=f"{count(len(design.teachers), 'teacher')} ({', '.join(pair.name for pair in design.pairs)})",
        curve={BASELINE: budget.seen},
        short_on_purpose=short,
    )


def _notes(design: Design) -> tuple[str, ...]:
    first, second = design.kinds
    notes = [
        f"{pair.name} is {pair.first.label} ({first}) and {pair.second.label} ({second})."
        for pair in design.pairs
        if pair.first.label != pair.second.label
    ]
    if any(pair.first.sha256 is None and pair.second.sha256 is None for pair in design.pairs):
        notes.append(
            "Teachers of one architecture can't be told apart without their weights: the plan counts one's runs."
        )
    return tuple(notes)


def _weights(design: Design, method: str) -> dict[str, Mapping[str, float]]:
    """Return the contrasts of one method; the baseline cancels out of each."""

    def differing(pair: TeacherPair, share: float) -> dict[str, float]:
        one, other = (arm_name(pair.name, kind, method) for kind in design.kinds)
        return {one: -share, other: share}

    def both(pair: TeacherPair, share: float) -> dict[str, float]:
        return {arm_name(pair.name, kind, method): share / 2 for kind in design.kinds}

    plain, *others = design.pairs
    found = {design.between(method, pair.name): differing(pair, 1) for pair in design.pairs}
    if others:
        share = 1 / len(design.pairs)
        found[design.pretraining(method)] = {k: w for pair in design.pairs for k, w in differing(pair, share).items()}
    for pair in others:
        found[design.architecture(method, pair.name)] = both(pair, 1) | both(plain, -1)
        found[design.interaction(method, pair.name)] = differing(pair, 1) | differing(plain, -1)
    return dict(found)


def _said(report: Report, design: Design) -> str:
    said = [_of_method(report, design, method) for method in design.methods]
    return " ".join(filter(None, (*said, _weak(report, design), _unmatched(report, design))))


def _of_method(report: Report, design: Design, method: str) -> str:
    whole = f"{report.study.label}, {method}:"
    main = design.pretraining(method)
    if why := no_verdict(report.contrasts[main]):
        return f"{whole} undecided {why} ({_numbers(report, main)})."
    others = [pair.name for pair in design.pairs[1:]]
    parts = {name: design.architecture(method, name) for name in others}
    across = {name: design.interaction(method, name) for name in others}
    with_architecture = [name for name, contrast in parts.items() if _clear(report, contrast)]
    crossed = [name for name, contrast in across.items() if _clear(report, contrast)]
    with_pretraining = _clear(report, main)
    goes = (
        "with both the pre-training and the architecture"
        if with_pretraining and with_architecture
        else "with the pre-training"
        if with_pretraining
        else "with the architecture"
        if with_architecture
        else "clearly with neither the pre-training nor the architecture"
        if others
        else "not clearly with the pre-training"
    )
    told = [f"{design.kinds[1]} minus {design.kinds[0]} {_numbers(report, main)}"]
    told += [f"{name} minus {design.pairs[0].name} {_numbers(report, parts[name])}" for name in with_architecture]
    if crossed:
        told.append(
            f"the difference between the two depends on the architecture: {design.pairs[0].name} and "
            f"{', '.join(crossed)} differ in it"
        )
    return f"{whole} the outcome goes {goes} ({'; '.join(told)})."


def _clear(report: Report, name: str) -> bool:
    return agree(report.contrasts[name], report.contrasts[odds(name)])


def _numbers(report: Report, name: str) -> str:
    return f"{effect(report.contrasts[name])}, {effect(report.contrasts[odds(name)])}"


def _weak(report: Report, design: Design) -> str:
    """Name the teachers whose probe is not clearly above the student from scratch."""
    found = {key: report.row(arm_name(*key, "probe")) for key in design.teachers}
    weak = [
        f"{' '.join(key)} ({row.top1:.1f} %)"
        for key, row in found.items()
        if outcome(row.contrast_or_raise()) != "gains"
    ]
    if not weak:
        return ""
    return f"Too weak here, not clearly above {BASELINE} ({report.rows[0].top1:.1f} %): {', '.join(weak)}."


def _unmatched(report: Report, design: Design) -> str:
    found = {p.name: [report.row(arm_name(p.name, kind, "probe")).top1 for kind in design.kinds] for p in design.pairs}
    far = [
        f"{name} ({one:.1f} and {other:.1f} %)" for name, (one, other) in found.items() if abs(one - other) > MATCHED
    ]
    return f"Unmatched in accuracy, by more than {MATCHED:g} points: {', '.join(far)}." if far else ""
