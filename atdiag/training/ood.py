"""Evaluate finished runs on other test sets, once; later calls read the predictions stored in the run's directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from atdiag.core.errors import UserError
from atdiag.core.progress import OnProgress, Progress, ignore
from atdiag.core.runs import DamagedRunError, Run, write_atomically
from atdiag.core.spec import RunSpec, Teacher
from atdiag.data import testsets
from atdiag.data.testsets import Opened, TestSet
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import loading
from atdiag.training import evaluation
from atdiag.training.predictions import Predictions, is_stored
from atdiag.training.provenance import environment

TOGETHER = 32
"""Maximum number of runs in memory at a time, together with the teachers that they need."""

LoadTeacher = Callable[[Teacher], ViT | Foreign]


def evaluate_runs(
    runs: Sequence[Run],
    test_sets: Sequence[TestSet],
    device: torch.device,
    load_teacher: LoadTeacher = loading.load,
    on_progress: OnProgress = ignore,
    should_stop: Callable[[], bool] = lambda: False,
    together: int = TOGETHER,
) -> int:
    """Evaluate finished runs on test sets and store each result at once; return how many were computed.

    Stored results are not recomputed. Runs with the same test images share them: for up to ``together`` runs each image
    is decoded and corrupted once, and each teacher runs once. A run's numbers do not depend on which others are
    evaluated with it. should_stop: polled before each test set; the next call computes the rest.

    Raises UserError, before anything is evaluated, for an unfinished run, a test set whose classes do not fit a run's,
    and a folder that does not match the test set's name; UserError for a teacher whose weights are missing,
    DamagedRunError for a run's weights that can't be read, DamagedPredictionsError for a damaged stored file, and
    BrokenImageError.
    """
    runs = list({run.path: run for run in runs}.values())
    test_sets = list(dict.fromkeys(test_sets))
    for run in runs:
        if not run.finished:
            raise UserError(f"run {run.id} is {run.state}, not finished", "train it first")
    missing = {run.path: [t for t in test_sets if not is_stored(run, t)] for run in runs}
    _check(runs, missing)
    total, done = sum(map(len, missing.values())), 0
    for group in _groups([run for run in runs if missing[run.path]], together):
        loaded = dict(zip(group, subjects(group, device, load_teacher), strict=True))
        for test_set in test_sets:
            todo = [run for run in group if test_set in missing[run.path]]
            if not todo:
                continue
            if should_stop():
                return done
            on_progress(Progress(done, total, doing=test_set.name))
            spec = group[0].spec
            opened = testsets.open_images(test_set, spec.data)
            results = evaluation.predict(
                [loaded[run] for run in todo], opened.images, device, spec.recipe.precision, among=opened.among
            )
            for run, result in zip(todo, results, strict=True):
                _store(run, test_set, result, opened, device)
                missing[run.path].remove(test_set)
                done += 1
    on_progress(Progress(done, total, doing="done"))
    return done


def shares(spec: RunSpec) -> str:
    """Return a key equal for runs that see the same test images in the same precision."""
    images = spec.data.only_tested()
    return f"{images.model_dump_json()} {spec.recipe.precision}"


def _check(runs: list[Run], missing: dict[Path, list[TestSet]]) -> None:
    """Check the pending evaluations, once for all runs that see the same images."""
    seen = set()
    for run in runs:
        for test_set in missing[run.path]:
            # A folder of the run's own images is the same folder whatever the corruption.
            images = (test_set.corruption is not None) if test_set.own_images else test_set.name
            key = (shares(run.spec), run.spec.network.classes, images)
            if key not in seen:
                testsets.check(test_set, run.spec.data, run.spec.network)
                seen.add(key)


def _groups(runs: Iterable[Run], together: int) -> Iterator[list[Run]]:
    """Yield groups of runs that can be evaluated in one pass; runs with the same teacher are adjacent."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.spec.teacher.weights if run.spec.teacher else ""):
        groups.setdefault(shares(run.spec), []).append(run)
    for group in groups.values():
        yield from (group[start : start + together] for start in range(0, len(group), together))


def subjects(runs: list[Run], device: torch.device, load_teacher: LoadTeacher) -> Iterator[evaluation.Predictor]:
    """Yield the runs' students on a device; each distinct teacher is loaded once."""
    loaded: dict[Teacher, ViT | Foreign] = {}

    def load(teacher: Teacher) -> ViT | Foreign:
        if teacher not in loaded:
            try:
                loaded[teacher] = load_teacher(teacher).to(device)
            except (loading.WeightsMissingError, ValueError) as fault:
                raise UserError(f"a run copies from its teacher: {fault}") from None
        return loaded[teacher]

    for run in runs:
        subject = evaluation.load_subject(run, load)
        subject.network.to(device)
        yield subject


def _store(run: Run, test_set: TestSet, result: Predictions, opened: Opened, device: torch.device) -> None:
    if not np.isfinite(result.log_p).all():
        raise DamagedRunError(run.weights, f"its outputs on {test_set.name} are not finite")
    about = {
        "run": run.id,
        "test_set": test_set.name,
        "semantics": testsets.SEMANTICS,
        "images": len(result.label),
        "fingerprint": opened.fingerprint,
        "environment": environment(device),
    }
    path = run.ood(test_set.file)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, result.to_bytes(about, opened.among))
