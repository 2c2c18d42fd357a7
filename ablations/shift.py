"""Pre-training data and transfer data: does the gain shrink where the two differ?

Li et al. 2024 find that it does. Two data sets differ in more than the distance from the pre-training data: one may
be harder, or leave less to gain. Here the transfer data are the same images, turned by quarters: for a network that
starts at random, whose weights and position embeddings know no direction, they are exactly as hard as before, and the
teacher was pre-trained on upright ones. The baseline of each turn shows it. Where training images are mirrored, only
the half turn keeps them as hard: mirroring a quarter turn swaps top and bottom. ``datasets`` compares other data sets.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, METHODS, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

TURNS = {"90": 1, "180": 2, "270": 3}
"""Degrees, counter-clockwise -> quarter turns."""


@ablation(
    order=136,
    reproduce={"teacher": "deit_s,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "turned": "90"},
    papers=("2024",),
)
def shift(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    turned: Annotated[
        str | None,
        typer.Option("--turned", help="Degrees: some of 90, 180, 270. [default: 90,180; with recipe.flip 180]"),
    ] = None,
) -> Study:
    """Transfer on turned images: does the gain shrink?"""
    choose(transfer, METHODS, "transfer")
    mirrored = lab.settings.profile.recipe["none"].flip
    asked = comma_separated(("180" if mirrored else "90,180") if turned is None else turned, "turned", "90,180")
    degrees = [choose(part, tuple(TURNS), "turned") for part in asked]
    if lab.settings.profile.data.turns:
        raise UserError("`data.turns` turns what shift compares with turned images", "leave it out")
    source = lab.teacher(teacher)
    student = lab.student(source)

    def arms(at: Lab, where: str = "") -> list[Arm]:
        passed = at.transfer(transfer, student)
        return [at.arm(f"{BASELINE}{where}", student), at.arm(f"{transfer}{where}", student, source, transfer=passed)]

    def contrasts(angle: str) -> list[Contrast]:
        there, scratch = (f"{name}{_where(angle)}" for name in (transfer, BASELINE))
        return [
            Contrast(_compared(transfer, angle), {there: 1, scratch: -1, transfer: -1, BASELINE: 1}),
            Contrast(f"gain of {transfer}{_where(angle)}", {there: 1, scratch: -1}),
        ]

    def verdict(report: Report) -> str:
        said = [f"upright it {verb_phrase(report.row(transfer).contrast_or_raise(), 'helps', 'hurts')}"]
        for angle in degrees:
            change = report.contrasts[_compared(transfer, angle)]
            said.append(f"turned by {angle} the gain {verb_phrase(change, 'grows', 'shrinks')}")
        return f"{transfer.capitalize()} of {source.label}: {'; '.join(said)}."

    return Study(
        ablation="shift",
        teacher=source,
        options={"transfer": transfer, "turned": ",".join(degrees)},
        arms=(
            *arms(lab),
            *(arm for angle in degrees for arm in arms(lab.under("data.turns", TURNS[angle]), _where(angle))),
        ),
        contrasts=tuple(one for angle in degrees for one in contrasts(angle)),
        verdict=verdict,
        claims=claims.of("shift"),
        reference=lab.reference(source),
        notes=_notes([angle for angle in degrees if mirrored and angle != "180"]),
    )


def _notes(harder: list[str]) -> tuple[str, ...]:
    if harder:
        return (f"Training images are mirrored: turned by {' and '.join(harder)} they are not exactly as hard.",)
    return ("Turned images are as hard for a random start as upright ones: their baselines differ by chance alone.",)


def _where(angle: str) -> str:
    return f", turned by {angle}"


def _compared(transfer: str, angle: str) -> str:
    return f"gain of {transfer}: turned by {angle} minus upright"
