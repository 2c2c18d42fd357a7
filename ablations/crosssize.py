"""Transfer from one teacher to students of several sizes: does a large teacher's attention help a small student?

Qin et al. 2026 give every student its teacher's size, and leave this open. Each size has its own baseline, and the gain
at a size is compared with the gain at the teacher's own size: a difference of differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec import Network, Teacher
from atdiag.networks.registry import sizes
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, METHODS, Arm, Contrast, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.student import parse
from atdiag.study.verdicts import effect, verb_phrase


@dataclass(frozen=True)
class SizeCase:
    """Students of one size, and the teacher as it meets them."""

    name: str
    lab: Lab
    teacher: Teacher

    @property
    def student(self) -> Network:
        """The standard student."""
        return self.lab.student(self.teacher)

    def arms(self, methods: Sequence[str], where: str = "") -> list[Arm]:
        """Return the baseline and an arm for each method. where: what is added to their names."""
        student = self.student
        passed = {method: self.lab.transfer(method, student) for method in methods}
        return [
            self.lab.arm(f"{BASELINE}{where}", student),
            *(self.lab.arm(f"{name}{where}", student, self.teacher, transfer=one) for name, one in passed.items()),
        ]


@ablation(order=140, reproduce={}, papers=())
def crosssize(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as dinov2_l; all: every one.")] = "deit_b",
    students: Annotated[
        str | None,
        typer.Option(help="Sizes of students, such as s,b,l, or names. [default: s,b; on real images s,b,l]"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Some of copy and distill.")] = "copy,distill",
) -> Series:
    """Transfer from one teacher to students of several sizes.

    Does size decide what they gain?
    """
    if lab.settings.student is not None:
        raise UserError("`student` is one size, and crosssize compares several", "give `students` s,b")
    passed = comma_separated(methods, "methods", "copy,distill")
    for method in passed:
        choose(method, METHODS, "methods")
    known = sizes.letters(lab.settings.profile.name)
    usual = [name for name in known if name in ("s", "b", "l")]
    named = comma_separated(students or ",".join(usual), "students", "s,b,l")
    if given := [name for name in named if "=" in name]:
        raise UserError(
            f"`students` {given[0]} is not a name", "give letters or names; `student` takes one by its width"
        )
    cases = _distinct([_case(lab, teacher, name) for name in named])
    own = next((case for case in cases if _is_own(case)), cases[-1])
    studies = tuple(_study(case, own, passed) for case in sorted(cases, key=lambda case: case.student.width))
    return Series("crosssize", studies, figure="crosssize")


def _case(lab: Lab, teacher: str, size: str) -> SizeCase:
    try:
        settings = replace(lab.settings, student=parse(size, lab.settings.profile.name))
    except UserError as fault:
        raise UserError(str(fault).replace("`student`", "`students`")) from None
    of_size = Lab(settings)
    return SizeCase(size, of_size, of_size.teacher(teacher))


def _distinct(cases: list[SizeCase]) -> list[SizeCase]:
    """Return the cases. Raises UserError for two names of one size."""
    by_student: dict[Network, str] = {}
    for case in cases:
        other = by_student.setdefault(case.student, case.name)
        if other != case.name:
            raise UserError(f"`students` {other} and {case.name} are the same size", "leave one of them out")
    return cases


def _is_own(case: SizeCase) -> bool:
    return not sizes.differing(case.student, case.teacher.network)


def _study(case: SizeCase, other: SizeCase, methods: Sequence[str]) -> Study:
    """Return the study of one size. other: the size with whose gain its own is compared."""
    arms, contrasts = case.arms(methods), list[Contrast]()
    if case is not other:
        where = f", {other.name}"
        arms += other.arms(methods, where)
        contrasts = [
            Contrast(
                compared(method, case.name, other.name),
                {method: 1, BASELINE: -1, f"{method}{where}": -1, f"{BASELINE}{where}": 1},
            )
            for method in methods
        ]
    label = f"{case.teacher.label}, student {case.name}"

    def verdict(report: Report) -> str:
        said = [f"{name} {verb_phrase(report.row(name).contrast_or_raise(), 'helps', 'hurts')}" for name in methods]
        against = [f"{contrast.name}: {effect(report.contrasts[contrast.name])}" for contrast in contrasts]
        return f"{label}: {'; '.join([*said, *against])}."

    return Study(
        ablation="crosssize",
        teacher=case.teacher,
        options={"methods": ",".join(methods), "size": case.name},
        arms=tuple(arms),
        contrasts=tuple(contrasts),
        verdict=verdict,
        label=label,
        reference=case.lab.reference(case.teacher),
        notes=(f"Arms named '..., {other.name}' are students of that size: runs of its own study.",)
        if contrasts
        else (),
        together="crosssize",
    )


def compared(method: str, size: str, other: str) -> str:
    """Return the name of the contrast of the gains at two sizes."""
    return f"gain of {method}: {size} minus {other}"
