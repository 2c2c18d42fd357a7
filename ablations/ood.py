"""Evaluate finished runs on other test sets: does an outcome persist out of distribution?

Qin et al. 2026 evaluate on ImageNet-A, -R, -Sketch and -V2; on such sets Li et al. 2024 find that attention transfer
trails fine-tuning. Nothing is trained: these are the runs of ``benchmark``. Corruptions (after Hendrycks & Dietterich
2019) apply to every data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ablations import claims, gains
from atdiag.core.selection import comma_separated
from atdiag.data import testsets
from atdiag.data.testsets import TestSet
from atdiag.study.builder import Lab
from atdiag.study.protocol import Series
from atdiag.study.registry import ablation

if TYPE_CHECKING:
    from atdiag.core.runs import Run
    from atdiag.core.spec import RunSpec

_CORRUPTED = "clean,gaussian_noise,defocus_blur,contrast,occlusion"
USUAL = {"mini": _CORRUPTED, "small": _CORRUPTED, "paper": "clean,imagenet-a,imagenet-r,imagenet-sketch,imagenet-v2"}


@dataclass(frozen=True)
class TestSetPredictions:
    """Predictions on a test set, stored in a run's directory."""

    test_set: TestSet

    @property
    def name(self) -> str:
        """Short name of the measurement."""
        return f"test on {self.test_set.name}"

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError if the runs can't be tested on it, or its images are not on this machine."""
        for data, network in {
            (spec.data.name, spec.network.classes): (spec.data, spec.network) for spec in specs
        }.values():
            testsets.check(self.test_set, data, network)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that were not tested on it."""
        from atdiag.training.predictions import is_stored

        return [run for run in runs if not is_stored(run, self.test_set)]

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Test the runs; those with the same images are tested together."""
        import torch

        from atdiag.training import ood

        ood.evaluate_runs(
            runs, [self.test_set], torch.device(device), on_progress=lambda now: on_progress(now.done, now.total)
        )

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return no numbers besides the accuracy."""
        return {}


@ablation(
    order=50,
    reproduce={"teacher": "deit_s,dinov2_s,dinov2_reg_s,clip_b,beitv2_b"},
    quick={"teacher": "deit_s,dinov2_s", "methods": "copy"},
)
def ood(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s,dinov2_s.")] = "dinov2_s",
    on: Annotated[
        str | None,
        typer.Option("--on", help="Test sets, such as imagenet-r,gaussian_noise:5. [default: those of the profile]"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Some of copy, distill and finetune.")] = "copy,finetune",
) -> Series:
    """Evaluate on other test sets: does the outcome persist?"""
    wanted = testsets.expand(
        comma_separated(
            USUAL.get(lab.settings.profile.name, _CORRUPTED) if on is None else on, "on", "imagenet-r,gaussian_noise:5"
        )
    )
    passed = comma_separated(methods, "methods", "copy,finetune")
    studies = []
    for test_set in wanted:
        study = gains.study(
            lab,
            "ood",
            teacher,
            passed,
            where=test_set.name,
            options={"on": test_set.name},
            test_set=None if test_set.name == testsets.CLEAN else test_set.name,
            measures=() if test_set.name == testsets.CLEAN else (TestSetPredictions(test_set),),
            claims=claims.of("ood"),
        )
        studies.append(study)
    return Series("ood", tuple(studies), figure="gains")
