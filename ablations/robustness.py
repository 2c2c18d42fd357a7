"""Fine-tuned and distilled students of equal accuracy, out of distribution: which loses more?

Li et al. 2024: under large shifts distilled students lose more than fine-tuned ones, and not on ImageNet-V2. Students
of unequal accuracy differ on every test set, whatever their robustness. So the fine-tuned student is trained on several
parts of the training images, with as many epochs, and for each seed the one whose accuracy on the validation part is
nearest the distilled student's is compared with it. The test images choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING, Annotated

import typer

from ablations import claims, gains
from ablations.ood import USUAL, TestSetPredictions
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.data import sources, testsets
from atdiag.data.testsets import TestSet
from atdiag.study.builder import Lab
from atdiag.study.protocol import METHODS, Arm, Contrast, EqualAccuracy, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

if TYPE_CHECKING:
    from atdiag.core.runs import Run
    from atdiag.core.spec import RunSpec

PARTS = (16, 12, 10, 8, 7, 6, 4, 2, 1)
"""The fine-tuned students are trained on a sixteenth, ... and on all training images."""
TUNED = "finetune, equal accuracy"
NEAR = (testsets.CLEAN, "imagenet-v2")
"""Test sets that are no large shift."""
_CORRUPTED = "clean,gaussian_noise:5,defocus_blur:5,contrast:5,occlusion:5"
_HELD_OUT, _MOST_HELD_OUT = 0.2, 10_000


@dataclass(frozen=True)
class Validation:
    """Accuracy on the validation part and number of training images, for the table; measured in training."""

    name: str = "accuracy on the validation part, from training"

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise nothing."""

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return none: it was measured in training."""
        return []

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Do nothing."""

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return the accuracy in per cent and the number of training images; none of the teacher itself."""
        found = run.result().get("validation_top1")
        return {} if found is None else {"validation top-1": found, "training images": run.spec.data.train}


@ablation(
    order=138,
    reproduce={"teacher": "deit_s,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "on": "clean,gaussian_noise:5"},
    papers=("2024",),
)
def robustness(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "distill",
    on: Annotated[
        str | None,
        typer.Option("--on", help="Test sets, such as imagenet-r,contrast:5. [default: those of the profile]"),
    ] = None,
) -> Series:
    """Compare equally accurate students out of distribution."""
    choose(transfer, METHODS, "transfer")
    profile = lab.settings.profile
    usual = USUAL["paper"] if profile.name == "paper" else _CORRUPTED
    wanted = testsets.expand(comma_separated(usual if on is None else on, "on", "imagenet-r,contrast:5"))
    held = sources.find(profile.data).validation_images(profile.data)
    number = held or min(_MOST_HELD_OUT, round(_HELD_OUT * profile.data.train))
    if number < 1:
        raise UserError(f"{profile.data.train} training images leave none to hold out", "give more, by `data.train`")
    at = lab.under("data.validation", number)  # a number, so that parts of the images are validated alike
    study = gains.study(at, "robustness", teacher, (transfer, "finetune"))
    scratch, passed, whole = study.arms
    least = profile.recipe["finetune"].batch_size
    counts = dict.fromkeys(max(least, at.settings.profile.data.train // part) for part in PARTS)
    tuned = [
        gains.study(at.under("data.train", count), "robustness", teacher, ("finetune",)).arms[1].specs
        for count in counts
    ]
    equal = EqualAccuracy(tuple(zip(*tuned, strict=True)), passed.specs)
    arms = (scratch, passed, Arm(TUNED, whole.specs, equal=equal))
    return Series("robustness", tuple(_on(test_set, study, transfer, arms) for test_set in wanted), figure="gains")


def _on(test_set: TestSet, study: Study, transfer: str, arms: tuple[Arm, ...]) -> Study:
    """Return the study on one test set."""
    name = test_set.name
    label = f"{study.teacher.label}, {name}"
    contrast = f"{'near' if name in NEAR else 'shifted'}: {transfer} minus {TUNED}"

    def verdict(report: Report) -> str:
        better = verb_phrase(report.contrasts[contrast], "is better", "is worse")
        own, other = (report.row(arm).numbers.get("validation top-1", nan) for arm in (transfer, TUNED))
        told = f"on the validation part {own:.1f} and {other:.1f} %"
        return f"{label}: {transfer}, beside a fine-tuned student of equal accuracy ({told}), {better}."

    return replace(
        study,
        options={"transfer": transfer, "on": name},
        arms=arms,
        contrasts=(Contrast(contrast, {transfer: 1, TUNED: -1}),),
        verdict=verdict,
        label=label,
        test_set=None if name == testsets.CLEAN else name,
        measures=(Validation(), *(() if name == testsets.CLEAN else (TestSetPredictions(test_set),))),
        claims=claims.of("robustness"),
        notes=(
            f"{TUNED}: for each seed, of the students fine-tuned on {', '.join(f'1/{part}' for part in PARTS[:-1])} "
            f"and all of the images, that whose accuracy on the validation part is nearest that of {transfer}.",
        ),
    )
