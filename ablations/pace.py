"""Rescue over the student's budget: do native components help a student under given maps, or only a short training?

Qin et al. 2026 report rescue, a difference of differences, at one length of training. Here it is measured at several
budgets, each a training of its own with its own schedule and baseline, in points and in log-odds: near a ceiling, gains
that are equal on one of these scales differ on the other, so a sign is only said where both show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Annotated, Any

import typer

from ablations.rescue import has_native_student
from atdiag.core.errors import UserError
from atdiag.core.selection import comma_separated
from atdiag.core.text import count
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Contrast, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import agree, effect, no_verdict

POINTS = "rescue: (native + transfer - native) - (standard + transfer - scratch)"
ODDS = "the same in log-odds"
MINI = "500x1,1000x2,2500x4,2500x10"


@dataclass(frozen=True, order=True)
class TrainingBudget:
    """A length of training: images in the training set, and epochs over them."""

    seen: int
    """Images seen in all."""
    epochs: int
    images: int | None = None
    """Size of the training set; None: the profile's."""

    def __str__(self) -> str:
        epochs = count(self.epochs, "epoch")
        return epochs if self.images is None else f"{self.images:,} images x {epochs}"


def budgets_option(mini: str) -> Any:
    """Return the option for training budgets, with the default at profile mini in its help."""
    return typer.Option(
        "--budgets",
        help=f"Images x epochs, or epochs alone, such as 500x1,2500x4. [default: at mini {mini}, else an eighth, "
        "a quarter, a half and all of the profile's epochs]",
    )


@ablation(order=145, reproduce={}, papers=())
def pace(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as dinov2_s.")] = "dinov2_s",
    budgets: Annotated[str | None, budgets_option(MINI)] = None,
    components: Annotated[
        str | None, typer.Option("--components", help="Native components, such as registers. [default: all]")
    ] = None,
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
) -> Series:
    """Rescue at several training budgets: is it one of speed?"""
    lengths = budgets_of(lab, budgets, MINI)
    studies = tuple(
        _study(under(lab, length), teacher, length, components, transfer, length < lengths[-1]) for length in lengths
    )
    return Series("pace", studies, figure="pace", verdict=said)


def budgets_of(lab: Lab, typed: str | None, mini: str) -> list[TrainingBudget]:
    """Return the budgets that are typed, the shortest first; by default ``mini``, or parts of another profile's epochs.

    Raises UserError for what is no budget.
    """
    profile = lab.settings.profile
    epochs = profile.recipe["none"].epochs
    if typed is None and profile.name != "mini":
        typed = ",".join(str(max(1, epochs // part)) for part in (8, 4, 2, 1))
    asked = [_budget(text, profile.data.train) for text in comma_separated(typed or mini, "budgets", "500x1,2500x4")]
    return sorted(dict.fromkeys(asked))


def _budget(text: str, usual: int) -> TrainingBudget:
    images, times, epochs = text.rpartition("x")
    if not all(part.isascii() and part.isdigit() and int(part) for part in ([images, epochs] if times else [epochs])):
        raise UserError(f"`budgets` {text!r} is no budget", "write images x epochs as 500x1, or epochs alone as 20")
    size = int(images) if images else None
    return TrainingBudget((size or usual) * int(epochs), int(epochs), size)


def under(lab: Lab, budget: TrainingBudget) -> Lab:
    """Return the lab in which students are trained for a budget."""
    lab = lab.under("recipe.epochs", budget.epochs)
    return lab if budget.images is None else lab.under("data.train", budget.images)


def _study(lab: Lab, teacher: str, budget: TrainingBudget, components: str | None, transfer: str, short: bool) -> Study:
    source = lab.teacher(teacher)
    has_native_student(source, "pace")
    own = source.network.components if components is None else comma_separated(components, "components", "registers")
    standard, native = lab.student(source), lab.student(source, own)
    passed = lab.transfer(transfer, standard)
    plain, full, alone = f"standard + {transfer}", f"native + {transfer}", "native, scratch"
    difference = {full: 1, alone: -1, plain: -1, BASELINE: 1}
    return Study(
        ablation="pace",
        teacher=source,
        options={"transfer": transfer, "budget": str(budget), **({"components": ",".join(own)} if components else {})},
        arms=(
            lab.baseline(source),
            lab.arm(plain, standard, source, transfer=passed),
            lab.arm(alone, native),
            lab.arm(full, native, source, transfer=passed),
        ),
        contrasts=(Contrast(POINTS, difference), Contrast(ODDS, difference, "log-odds")),
        verdict=lambda report: f"{report.study.label}: native components change the gain by {_both(report)}.",
        figure="contrasts",
        label=f"{source.label}, {budget}",
        reference=lab.reference(source),
        notes=(f"Native here: {', '.join(own)}.",),
        curve={BASELINE: budget.seen, plain: budget.seen, alone: budget.seen, full: budget.seen},
        short_on_purpose=short,
    )


def said(reports: Sequence[Report]) -> str:
    """State the sign of rescue at the smallest and the largest budget of each teacher, and where it crosses zero."""
    by_teacher: dict[str, list[Report]] = {}
    for report in reports:
        by_teacher.setdefault(report.study.teacher.label, []).append(report)
    return " ".join(_of_teacher(label, one) for label, one in by_teacher.items())


def _of_teacher(label: str, reports: Sequence[Report]) -> str:
    first, last = reports[0], reports[-1]
    said = f"Native components of {label} change what a student gains by {_both(first)} at {_budget_of(first)}"
    if last is not first:
        said += f" and by {_both(last)} at {_budget_of(last)}"
        for scale, name in (("points", POINTS), ("log-odds", ODDS)):
            said += f"; in {scale} {_where(crossing(reports, name))}"
    return f"{said}."


def _budget_of(report: Report) -> str:
    return report.study.options["budget"]


def _both(report: Report) -> str:
    """Return rescue on both scales, and the sign if both show it."""
    points, odds = report.contrasts[POINTS], report.contrasts[ODDS]
    numbers = f"{effect(points)} and {effect(odds)}"
    if why := no_verdict(points):
        return f"{numbers} (undecided {why})"
    if agree(points, odds):
        return f"{numbers} (clear on both scales)"
    if points.clear or odds.clear:
        return f"{numbers} (clear in {'points' if points.clear else 'log-odds'} alone)"
    return f"{numbers} (within noise)"


@dataclass(frozen=True)
class Crossing:
    """Where rescue changes its sign, in images seen. Ends are None where the budgets do not reach them."""

    images: float | None
    """Where the estimate does, by linear interpolation over log images; None if it never does."""
    low: float | None
    """The smallest budget whose interval, likewise interpolated, includes zero; None: that of the first does."""
    high: float | None
    """The largest such budget; None: that of the last does."""


def crossing(reports: Sequence[Report], name: str) -> Crossing | None:
    """Return where a contrast changes its sign over budgets; None where one sign is clear at all of them.

    Estimate and limits of the interval are interpolated over the logarithm of images seen. Between two budgets the
    interpolated limits are those of perfectly correlated errors, which no correlation exceeds, so that the set of
    budgets whose interval includes zero covers the crossing at least as often as an interval covers its estimate.
    """
    curve = sorted((report.study.curve[BASELINE], report.contrasts[name]) for report in reports)
    places = [log2(images) for images, _ in curve]
    values, lows, highs = ([getattr(one, what) for _, one in curve] for what in ("value", "low", "high"))
    inside = [place for place, low, high in zip(places, lows, highs, strict=True) if low <= 0 <= high]
    inside += [*_zeros(places, lows), *_zeros(places, highs)]
    if not inside:
        return None
    zeros = _zeros(places, values)
    least, most = min(inside), max(inside)
    return Crossing(
        2 ** zeros[0] if len(zeros) == 1 else None,
        None if least == places[0] else 2**least,
        None if most == places[-1] else 2**most,
    )


def _zeros(places: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return where a curve of straight pieces changes its sign."""
    pairs = zip(pairwise(places), pairwise(values), strict=True)
    return [x + (y - x) * a / (a - b) for (x, y), (a, b) in pairs if a * b < 0]


def _where(place: Crossing | None) -> str:
    if place is None:
        return "its sign is the same at all budgets"
    low = "fewer than all tried" if place.low is None else f"{place.low:,.0f}"
    high = "more than all tried" if place.high is None else f"{place.high:,.0f}"
    at = "nowhere, or more than once" if place.images is None else f"at {place.images:,.0f} images seen"
    return f"it crosses zero {at} [{low}, {high}]"
