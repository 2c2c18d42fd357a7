"""Which tensor of the attention carries the benefit: the map, or its queries, keys or values alone?

Li et al. 2024: a student that is given the teacher's queries alone does best, better than with the map.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.study.builder import Lab
from atdiag.study.protocol import METHODS, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

TENSORS = ("map", "q", "k", "v")


@ablation(
    order=120,
    reproduce={"teacher": "deit_s,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "methods": "copy"},
    papers=("2024",),
)
def tensors(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    methods: Annotated[str, typer.Option("--methods", help="Some of copy, distill.")] = "copy,distill",
    tensors: Annotated[str, typer.Option("--tensors", help="Some of map, q, k, v.")] = "map,q,k,v",
) -> Study:
    """Transfer the map, or q, k, v alone: which carries the gain?"""
    wanted = comma_separated(methods, "methods", "copy,distill")
    for method in wanted:
        choose(method, METHODS, "methods")
    names = comma_separated(tensors, "tensors", "map,q,k,v")
    for name in names:
        choose(name, TENSORS, "tensors")
    source = lab.teacher(teacher)
    student = lab.student(source)
    own, theirs = ((one.width, one.heads, one.grid) for one in (student, source.network))
    if own != theirs and {*names} != {"map"}:
        raise UserError(
            "q, k and v pass only between networks of one width, number of heads and grid, and the student is another "
            f"size than {source.label}",
            "leave `student` out, or give `tensors` map",
        )

    def arm(method: str, name: str) -> Arm:
        passed = lab.under("transfer.tensor", name).transfer(method, student)
        return lab.arm(f"{method} {name}", student, source, transfer=passed)

    def verdict(report: Report) -> str:
        said = [
            f"{method} of {name} {verb_phrase(report.row(f'{method} {name}').contrast_or_raise(), 'helps', 'hurts')}"
            for method in wanted
            for name in names
        ]
        return f"{source.label}: {'; '.join(said)}."

    return Study(
        ablation="tensors",
        teacher=source,
        options={"methods": ",".join(wanted), "tensors": ",".join(names)},
        arms=(lab.baseline(source), *(arm(method, name) for method in wanted for name in names)),
        contrasts=tuple(
            Contrast(f"{method}: {name} minus map", {f"{method} {name}": 1, f"{method} map": -1})
            for method in wanted
            for name in names
            if name != "map" and "map" in names
        ),
        verdict=verdict,
        claims=claims.of("tensors"),
        reference=lab.reference(source),
        notes=("Maps are distilled by cross-entropy, q, k and v by mean squared error: their weights do not compare.",)
        if "distill" in wanted
        else (),
    )
