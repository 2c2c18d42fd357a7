"""Average the probabilities of a fine-tuned and a distilled student: does each know what the other does not?

Li et al. 2024: the two together are better than either alone, and than two networks of one kind. Pairs of one kind are
the controls, since any two networks together are better than one.

The runs are those of ``benchmark``, with twice as many seeds. A pair of one kind needs runs of two seeds, so every
pair, of one kind or two, takes its second run from seed N + s, for seeds s from 0 to N - 1: no run is in two pairs of
one arm, whose outcomes would then not be independent, and all pairs have seen equally many draws of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from ablations import claims, gains
from atdiag.core.errors import UserError
from atdiag.core.runs import Run, digest
from atdiag.core.selection import choose
from atdiag.core.spec import RunSpec, Seed
from atdiag.study.builder import Lab
from atdiag.study.protocol import METHODS, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.settings import SEEDS
from atdiag.study.verdicts import verb_phrase


@dataclass(frozen=True)
class PairPredictions:
    """Predictions of pairs of runs by the mean of their class probabilities, stored in the first one's directory."""

    pairs: tuple[tuple[RunSpec, RunSpec], ...]
    of: str
    """The teacher's label."""

    @property
    def name(self) -> str:
        """Name of the measurement, other for other pairs."""
        return f"ensembles of {self.of} ({digest([[one.id, other.id] for one, other in self.pairs])[:6]})"

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise nothing: the runs were trained on these images."""

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs of which a pair, as its first one, has not been evaluated."""
        from atdiag.training.predictions import is_pair_stored

        return [run for run in runs if not all(is_pair_stored(*pair) for pair in self._of(run))]

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Evaluate the pairs; those with the same images are evaluated together."""
        import torch

        from atdiag.training import ensembles

        ensembles.evaluate_pairs(
            [pair for run in runs for pair in self._of(run)],
            torch.device(device),
            on_progress=lambda now: on_progress(now.done, now.total),
        )

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return no numbers besides the accuracy."""
        return {}

    def _of(self, run: Run) -> list[tuple[Run, Run]]:
        return [(run, Run(run.path.parent / other.id)) for one, other in self.pairs if one.id == run.id]


@ablation(
    order=132,
    reproduce={"teacher": "deit_b,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s"},
    papers=("2024",),
)
def ensemble(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "distill",
) -> Study:
    """Average a fine-tuned and a distilled student: any better?"""
    choose(transfer, METHODS, "transfer")
    kinds = ("finetune", transfer)
    first = gains.study(lab, "ensemble", teacher, kinds)
    second = gains.study(Lab(replace(lab.settings, seeds=_others(lab.settings.seeds))), "ensemble", teacher, kinds)
    scratch, *alone = first.arms
    own = {arm.name: arm.specs for arm in alone}
    others = {arm.name: arm.specs for arm in second.arms[1:]}

    def pair(name: str, one: str, other: str) -> Arm:
        return Arm(name, own[one], partners=others[other])

    both = f"finetune + {transfer}"
    controls = {f"two of {kind}": kind for kind in kinds}
    pairs = (pair(both, *kinds), *(pair(name, kind, kind) for name, kind in controls.items()))

    def verdict(report: Report) -> str:
        said = [
            f"against {than} it {verb_phrase(report.contrasts[_minus(both, than)], 'is better', 'is worse')}"
            for than in (*kinds, *controls)
        ]
        return f"{first.label}, {both}: {'; '.join(said)}."

    return Study(
        ablation="ensemble",
        teacher=first.teacher,
        options={"transfer": transfer},
        arms=(scratch, *alone, *pairs),
        contrasts=tuple(Contrast(_minus(both, than), {both: 1, than: -1}) for than in (*kinds, *controls)),
        verdict=verdict,
        measures=(PairPredictions(tuple(both for arm in pairs for both in _zipped(arm)), first.teacher.label),),
        claims=claims.of("ensemble"),
        reference=first.reference,
        notes=(*first.notes, "Pairs: the mean of both runs' class probabilities; the second run is of another seed."),
    )


def _minus(one: str, other: str) -> str:
    return f"{one} minus {other}"


def _zipped(arm: Arm) -> list[tuple[RunSpec, RunSpec]]:
    return list(zip(arm.specs, arm.partners, strict=True))


def _others(seeds: tuple[Seed, ...]) -> tuple[Seed, ...]:
    """Return the seed of each pair's second run: as many further on as there are seeds."""
    further = len(seeds)
    if max(seed.data for seed in seeds) + further >= SEEDS:
        raise UserError("`first_seed` leaves no seeds for the second runs of pairs", "give a smaller one")
    return tuple(Seed(data=seed.data + further, model=seed.model + further) for seed in seeds)
