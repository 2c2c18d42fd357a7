"""Check that a baseline is far enough above chance for contrasts with it to be informative.

Arms near chance differ by little, whatever their transfer is worth, so a small difference between them shows nothing.
The lower limit of the baseline's accuracy must therefore exceed chance by ten points, or by a third of the way from
chance to the teacher's accuracy if that is less.

*Chance* is the share of the most frequent class among the test labels: the highest accuracy possible without looking at
an image. For K balanced classes that is 1 / K; for unbalanced ones more, and an arm that has only learnt the most
frequent class is then still at chance, although its accuracy is above 1 / K.

*The lower limit* is that of the interval over seeds and test images. Fewer than three seeds give no useful interval
(with two it extends 13 standard errors to each side): then it is the lowest of the single seeds' limits, over images
only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atdiag.study.protocol import ArmResult, Footing, Report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from atdiag.stats.contrasts import Outcomes

MARGIN = 10.0
"""Points above chance that the baseline needs; a third of the teacher's if that is less."""
UNDERTRAINED = "undertrained: nothing can be said"
"""The verdict on a study whose baseline is near chance."""
_SHORT = 10
"""Epochs below which no longer training is proposed."""
FEW_CLASSES = 2
"""Arms that predict at most this many classes are named, if there are more."""


def footing(baseline: Outcomes, labels: NDArray[np.integer], teacher: float | None) -> Footing:
    """Return how far a baseline is above chance on test images with these labels [n].

    teacher: its accuracy in per cent, if known.
    """
    import numpy as np

    from atdiag.stats.contrasts import FEWEST_SEEDS, Outcomes, estimate

    _, counts = np.unique(labels, return_counts=True)
    chance = 100 * float(counts.max()) / len(labels)
    margin = MARGIN if teacher is None else max(min(MARGIN, (teacher - chance) / 3), 0.0)
    together = [baseline]
    if len(baseline.correct) < FEWEST_SEEDS:
        together = [Outcomes({seed: right}, baseline.clusters) for seed, right in baseline.correct.items()]
    low = min(estimate({"": one}, {"": 1}).low for one in together)
    return Footing(chance, low, chance + margin, len(counts))


def verdict(report: Report) -> str:
    """Return the verdict on a study whose baseline is near chance: the reason and the remedy."""
    return f"{report.study.label}: {UNDERTRAINED} ({_stands(report)}). {remedy(report)}"


def longer(epochs: int) -> int:
    """Return the epochs to train for in place of so few: twice as many, and at least ten."""
    return max(2 * epochs, _SHORT)


def remedy(report: Report) -> str:
    """Return the settings that train for longer."""
    spec = report.study.arms[0].specs[0]
    asked = "`epochs`" if "epochs" in report.study.options else "`recipe.epochs`"
    train = f"Train longer: {asked}={longer(spec.recipe.epochs)} (here {spec.recipe.epochs})"
    if spec.data.image_size is not None:
        return f"{train}, or on more images."
    return f"{train}, or on more images: `data.train`={2 * spec.data.train} (here {spec.data.train})."


def notes(report: Report) -> list[str]:
    """Return notes on a study near chance, and on arms that predict only one or two classes."""
    stands = report.footing
    if stands is None:
        return []
    out = []
    if report.undertrained:
        out.append(f"{report.study.label} is {UNDERTRAINED} ({_stands(report)}).")
    elif stands.undertrained:
        out.append(f"{report.study.label} is near chance, but is evaluated all the same: {_stands(report)}.")
    for row in (*report.rows, *([report.reference] if report.reference else [])):
        if said := _few_classes(row, stands.classes):
            whose = f"{report.study.teacher.label} itself" if row is report.reference else row.arm
            out.append(f"{report.study.label}: {whose} predicts {said} of {stands.classes}.")
    return out


def _few_classes(row: ArmResult, classes: int) -> str:
    """Return ``one class only, with 2 of 3 seeds``; empty for an arm that predicts more."""
    few = [count for count in row.classes if count <= FEW_CLASSES and count < classes]
    if not few:
        return ""
    least = {(1, 1): "one class only", (2, 2): "two classes only"}.get((min(few), max(few)), "one or two classes only")
    return least if row.seeds == 1 else f"{least} with {len(few)} of {row.seeds} seeds,"


def _stands(report: Report) -> str:
    stands, baseline = report.footing, report.rows[0]
    assert stands is not None
    return (
        f"{baseline.arm} reaches {baseline.top1:.1f} %, lower limit {stands.low:.1f}; chance is {stands.chance:.1f} %, "
        f"and a verdict needs a lower limit of {stands.needed:.1f}"
    )
