"""What a prediction is made of and held against: teachers by kind, their measurements, and the gains of transfers.

Teachers, kinds, budgets and measurements are those of the plan in ``docs/why.md``; ``benchmarks/prediction.py`` uses
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log2
from pathlib import Path

import numpy as np
import torch

from ablations.benchmark import benchmark
from atdiag.analysis import images, statistics, subjects
from atdiag.core.runs import Store
from atdiag.hooks.branches import branch_gains
from atdiag.stats.contrasts import FEWEST_SEEDS, Outcomes, estimate
from atdiag.study.aggregate import answered
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Study
from atdiag.study.settings import resolve
from atdiag.training import evaluation
from atdiag.transfer import ops
from atdiag.transfer.observation import CaptureRequest
from benchmarks import calibration

KINDS = {
    "plain": ("deit_s", "deit_b", "siglip2_b"),
    "LayerScale": ("dinov2_s", "dinov2_b", "dinov2_reg_s"),
    "CLIP": ("clip_b", "scaled"),
    "BEiT": ("beitv2_b",),
    "EVA": ("eva02_s",),
    "hub": ("hub", "hub_2", "hub_3", "hub_sliced"),
    "sink": ("sink",),
    "offset": ("offset",),
    "weak": ("weak",),
    "sharp": ("sharp",),
    "uniform": ("uniform",),
    "shuffled": ("shuffled",),
    "scrambled": ("scrambled", "gated"),
    "drawn anew": ("start_without_qk", "start_without_mlp"),
}
"""Kind -> its teachers."""
TEACHERS = {name: kind for kind, names in KINDS.items() for name in names}
TRANSFERS = ("copy", "distill")
BUDGETS = ((1000, 2), (2500, 4))
"""Images and epochs."""
WINDOWS = ((0, 0), (calibration.FIRST_SEED, 1))
"""First seed and draw of test scenes: those of the commands, and those of the calibration's first study."""
MOST_SEEDS = 5
IMAGES = 64
OF_MAPS = ("entropy", "distance", "heads", "sink", "rank", "lost", "branch")
FEWEST_KINDS = 10
"""Of a budget that enters the model."""


@dataclass(frozen=True)
class Cell:
    """What a transfer from one teacher gains at one budget."""

    teacher: str
    kind: str
    transfer: str
    train: int
    epochs: int
    seeds: int
    first_seed: int
    accuracy: float
    """Of the teacher itself, per cent."""
    baseline: float
    """Of the student from scratch, per cent."""
    gain: float
    """Points, with the limits of its 95 % interval."""
    low: float
    high: float
    se: float
    log_odds: float
    log_odds_low: float
    log_odds_high: float

    @property
    def budget(self) -> tuple[int, int]:
        """Images and epochs."""
        return self.train, self.epochs


def study(teacher: str, budget: tuple[int, int], window: tuple[int, int], seeds: int) -> Study:
    """Return the study of copy and distillation from a teacher."""
    (train, epochs), (first, draw) = budget, window
    sets = (f"data.train={train}", f"recipe.epochs={epochs}", f"data.test_draw={draw}")
    settings = resolve("mini", seeds, sets, environment={}, folder=Path("/nonexistent"), first_seed=first)
    return benchmark(Lab(settings), teacher, ",".join(TRANSFERS))


def finished(arm: Arm, store: Store) -> Outcomes | None:
    """Return the outcomes of an arm's finished runs; None if there is none."""
    specs = tuple(spec for spec in arm.specs if store.run(spec).finished)
    return answered(Arm(arm.name, specs), store).outcomes if specs else None


def accuracy(teacher: str, store: Store) -> float | None:
    """Return a teacher's own accuracy in per cent, on the test scenes of the first window that has it."""
    for window in WINDOWS:
        reference = study(teacher, BUDGETS[0], window, 1).reference
        found = None if reference is None else finished(reference, store)
        if found is not None:
            return 100 * float(np.mean([right.mean() for right in found.correct.values()]))
    return None


def cell(teacher: str, transfer: str, budget: tuple[int, int], store: Store) -> Cell | None:
    """Return a cell from finished runs; None with fewer than three seeds. Of two windows that with more seeds."""
    best: Cell | None = None
    own = accuracy(teacher, store)
    for window in WINDOWS:
        made = study(teacher, budget, window, MOST_SEEDS)
        arms = {arm.name: arm for arm in made.arms}
        found = {name: finished(arms[name], store) for name in (BASELINE, transfer)}
        outcomes = {name: one for name, one in found.items() if one is not None}
        if own is None or len(outcomes) < 2:
            continue
        common = outcomes[BASELINE].correct.keys() & outcomes[transfer].correct.keys()
        if len(common) < FEWEST_SEEDS or (best is not None and len(common) <= best.seeds):
            continue
        weights = {transfer: 1.0, BASELINE: -1.0}
        points, odds = estimate(outcomes, weights), estimate(outcomes, weights, scale="log-odds")
        best = Cell(
            teacher,
            TEACHERS[teacher],
            transfer,
            *budget,
            points.seeds,
            window[0],
            *(
                round(value, 6)
                for value in (
                    own,
                    100 * float(np.mean([outcomes[BASELINE].correct[seed].mean() for seed in common])),
                    *(points.value, points.low, points.high, points.se),
                    *(odds.value, odds.low, odds.high),
                )
            ),
        )
    return best


@torch.no_grad()
def measured(teacher: str) -> dict[str, float]:
    """Return the measurements of a teacher: of the maps that the standard student is given, and of its branches."""
    made = study(teacher, BUDGETS[0], WINDOWS[0], 1)
    spec, student = made.teacher, made.arms[0].specs[0].network
    subject = subjects.loaded(spec, made.arms[0].specs[0].data)
    some = images.choose(IMAGES, made.arms[0].specs[0].data, subject.network)
    vit = subject.module
    blocks = range(student.depth)
    sums = dict.fromkeys(OF_MAPS[:-1], 0.0)
    for batch in some.batches(IMAGES):
        whole = vit.observe(batch.pixels, CaptureRequest(maps=frozenset(blocks)))
        passed = evaluation.fit(whole, vit, student)
        shared = vit.shared_tokens(student)
        for block in blocks:
            p, all_ = ops.probabilities(passed.seen[block].map), ops.probabilities(whole.seen[block].map)
            kept = all_ if shared is None else all_[:, :, shared][..., shared]
            here = {
                "entropy": statistics.entropy(p) / log2(student.tokens),
                "distance": statistics.distance(p, student) / student.image_size,
                "heads": statistics.redundancy(p) / len(p),
                "sink": p.mean(2).amax(-1),
                "rank": statistics.effective_rank(p) / student.tokens,
                "lost": 1 - kept.sum(-1).mean(-1),
            }
            for name, values in here.items():
                sums[name] += float(values.mean()) * len(p) / len(some) / len(blocks)
    gains = branch_gains(subject, some)
    every = sums | {"branch": float(np.log10(gains).mean())}
    return {name: round(value, 6) for name, value in every.items()}


def train(store: Store, until: float) -> bool:
    """Train what cells lack; return whether there was time for all.

    The longer budget first, and there a teacher of each kind before the second of any.
    """
    turns = range(max(map(len, KINDS.values())))
    in_turn = [names[i] for i in turns for names in KINDS.values() if i < len(names)]
    for budget, teacher in product(BUDGETS[::-1], in_turn):
        lacking = [one for one in TRANSFERS if cell(teacher, one, budget, store) is None]
        made = study(teacher, budget, WINDOWS[0], FEWEST_SEEDS)
        needed = {BASELINE, "teacher", *lacking}
        arms = [arm for arm in (made.reference, *made.arms) if arm is not None and arm.name in needed]
        if lacking and not calibration.train([spec for arm in arms for spec in arm.specs], store, until):
            return False
    return True


def entering(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of budgets that enter the model: a few teachers would weigh as much as all others."""
    kinds = {budget: {one.kind for one in cells if one.budget == budget} for budget in BUDGETS}
    return [one for one in cells if len(kinds[one.budget]) >= FEWEST_KINDS]
