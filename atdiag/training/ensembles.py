"""Evaluate two finished runs together: the mean of their class probabilities, once for each pair.

What is kept are the pair's predictions, in the first run's directory, not the probabilities: those of one run on
ImageNet's 50,000 test images take 200 MB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atdiag.core.errors import UserError
from atdiag.core.progress import OnProgress, Progress, ignore
from atdiag.core.runs import Run, write_atomically
from atdiag.data import sources
from atdiag.networks.weights import loading
from atdiag.training import evaluation, ood
from atdiag.training.predictions import about_pair, is_pair_stored

Pair = tuple[Run, Run]


def evaluate_pairs(
    pairs: Sequence[Pair],
    device: torch.device,
    load_teacher: ood.LoadTeacher = loading.load,
    on_progress: OnProgress = ignore,
    together: int = ood.TOGETHER,
) -> int:
    """Evaluate pairs of finished runs on their test images and store each result; return how many were computed.

    Stored results are not recomputed. Pairs with the same images share a pass of up to ``together`` runs. A pair's
    numbers do not depend on which others are evaluated with it. Raises UserError for an unfinished run and for a pair
    with unequal test images or precision, and what :func:`atdiag.training.ood.evaluate_runs` raises for weights.
    """
    for pair in pairs:
        for run in pair:
            if not run.finished:
                raise UserError(f"run {run.id} is {run.state}, not finished", "train it first")
        if len({ood.shares(run.spec) for run in pair}) > 1:
            raise UserError(f"runs {pair[0].id} and {pair[1].id} are not tested on the same images in one precision")
    todo = [pair for pair in dict.fromkeys(pairs) if not is_pair_stored(*pair)]
    done = 0
    for group in _groups(todo, together):
        on_progress(Progress(done, len(todo), doing="ensembles"))
        runs = list(dict.fromkeys(run for pair in group for run in pair))
        spec = runs[0].spec
        subjects = list(ood.subjects(runs, device, load_teacher))
        images = sources.find(spec.data).test_split(spec.data)
        places = [(runs.index(one), runs.index(other)) for one, other in group]
        found = evaluation.predict(subjects, images, device, spec.recipe.precision, ensembles=places)
        for (one, other), result in zip(group, found[len(runs) :], strict=True):
            path = one.ensemble(other.id)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, result.to_bytes(about_pair(one, other)))
        done += len(group)
    on_progress(Progress(done, len(todo), doing="done"))
    return done


def _groups(pairs: Sequence[Pair], together: int) -> list[list[Pair]]:
    """Group pairs with the same test images, each group of at most ``together`` runs (a pair at least)."""
    out: list[list[Pair]] = []
    by_images: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_images.setdefault(ood.shares(pair[0].spec), []).append(pair)
    for some in by_images.values():
        group: list[Pair] = []
        for pair in some:
            if group and len({run for each in (*group, pair) for run in each}) > together:
                out.append(group)
                group = []
            group.append(pair)
        out.append(group)
    return out
