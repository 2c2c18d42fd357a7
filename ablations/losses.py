"""Other losses between the maps, and other weights of the loss: is a failure due to the loss?

Qin et al. 2026: cross-entropy, mean squared error, Jensen-Shannon divergence and L1 show the same trend; success grows
with the weight, failure worsens. The slope over the weight is a contrast of its own: the least-squares line through a
loss's arms over log10 of the weight, in points per tenfold weight.
"""

from __future__ import annotations

from math import log10
from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec.losses import distinct
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Contrast, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase


@ablation(
    order=100,
    reproduce={"teacher": "deit_s,dinov2_s"},
    quick={"teacher": "dinov2_s", "losses": "ce,jsd", "weights": "0.3,30"},
)
def losses(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s,dinov2_s.")] = "dinov2_s",
    losses: Annotated[str, typer.Option("--losses", help=f"Some of {', '.join(distinct())}.")] = "ce,mse,jsd,l1",
    weights: Annotated[str, typer.Option("--weights", help="Weights of the loss.")] = "0.3,3,30",
) -> Series:
    """Distill with several losses and weights: is it the loss?"""
    names = comma_separated(losses, "losses", "ce,mse,jsd,l1")
    for name in names:
        choose(name, distinct(), "losses")
    factors = sorted({_weight(text) for text in comma_separated(weights, "weights", "0.3,3,30")})
    source = lab.teacher(teacher)
    student = lab.student(source)

    def arm(loss: str, weight: float) -> Arm:
        passed = lab.under("transfer.loss", loss).under("transfer.weight", weight).transfer("distill", student)
        return lab.arm(_name(loss, weight), student, source, transfer=passed)

    def verdict(report: Report) -> str:
        arms = [row.contrast_or_raise() for row in report.rows[1:]]
        up, down = sum(e.clear and e.value > 0 for e in arms), sum(e.clear and e.value < 0 for e in arms)
        said = [f"{name.partition(':')[0]} {verb_phrase(e, 'rises', 'falls')}" for name, e in report.contrasts.items()]
        slopes = f" Accuracy per tenfold weight: {'; '.join(said)}." if said else ""
        noise = len(arms) - up - down
        return f"Distilling {source.label}: {up} of {len(arms)} arms help, {down} hurt, {noise} undecided.{slopes}"

    study = Study(
        ablation="losses",
        teacher=source,
        options={"losses": ",".join(names), "weights": ",".join(f"{w:g}" for w in factors)},
        arms=(lab.baseline(source), *(arm(loss, weight) for loss in names for weight in factors)),
        contrasts=tuple(Contrast(f"{loss}: per tenfold weight", slope(loss, factors)) for loss in names)
        if len(factors) > 1
        else (),
        verdict=verdict,
        claims=claims.of("losses"),
        reference=lab.reference(source),
        notes=("Losses differ in scale, so equal weights of two losses are not equally strong.",),
        curve={BASELINE: 0} | {_name(loss, w): i for loss in names for i, w in enumerate(factors)},
    )
    return Series("losses", (study,), figure="losses")


def slope(loss: str, weights: list[float]) -> dict[str, float]:
    """Return the least-squares slope over log10 of the weight, as a contrast of a loss's arms."""
    places = [log10(weight) for weight in weights]
    mean = sum(places) / len(places)
    spread = sum((place - mean) ** 2 for place in places)
    return {_name(loss, w): (place - mean) / spread for w, place in zip(weights, places, strict=True)}


def _name(loss: str, weight: float) -> str:
    return f"{loss} x{weight:g}"


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise UserError(f"`weights` {text!r} is not a positive number", "write it as '0.3,3,30'")
    return weight
