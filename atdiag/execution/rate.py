"""Measure how fast this machine trains, by training for a moment. Imports nothing heavy before that."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from atdiag.core import paths
from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import Progress
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.execution import cost, devices, plan

_SECONDS = 8.0
"""Duration of the measurement, after a first step that is not counted."""
_STEP = 50e9
"""Work of a run's step on a CPU, in floating-point operations: that of a large network's whole batch takes too long."""
_SMALL_BATCH = 8
"""Images in a batch, at least."""


class _EnoughError(Exception):
    """Ends the training from inside; nothing is saved."""


def measure(specs: Sequence[RunSpec], options: ExecutionOptions) -> float:
    """Return the FLOP/s at which one process of this machine trains such runs, image loading included.

    The cheapest and the most expensive run of the largest cohort are trained side by side, in this process and in a
    temporary folder, for a few seconds. Raises what :func:`atdiag.training.cohort.train` raises, and ValueError if no
    run is trained.
    """
    import torch

    from atdiag.networks.weights import loading
    from atdiag.training import cohort

    device = devices.resolve(options.device)
    trained = [spec for spec in specs if spec.recipe.epochs]
    if not trained:
        raise ValueError("none of these runs is trained")
    largest: list[RunSpec] = max(plan.cohorts(trained), key=lambda group: len(group))
    group = sorted(largest, key=cost.seconds)
    chosen = [_short(spec, device) for spec in dict.fromkeys((group[0], group[-1]))]
    work = sum(cost.seconds(spec, 1.0, tested=False) / _steps(spec) for spec in chosen)
    images = len(chosen) * chosen[0].recipe.batch_size
    clock = _Clock()
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="atdiag-") as folder, paths.looking_in(options.data_dir):
            cohort.train(chosen, Store(Path(folder)), loading.load, options, clock.report, clock.stop)
    except _EnoughError:
        pass
    finally:
        torch.set_num_threads(before)
    return clock.images / images * work / clock.seconds


class _Clock:
    """Counts images and seconds from the end of the first step on."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None
        self.images, self.seconds = 0, 0.0

    def report(self, now: Progress) -> None:
        """Take a report of the training's progress, which it makes after every step."""
        if now.doing != "training":
            return
        if self.first is None:
            self.first = time.perf_counter(), now.images
        elif now.images - self.first[1] > self.images:
            self.images, self.seconds = now.images - self.first[1], time.perf_counter() - self.first[0]

    def stop(self) -> bool:
        """End the training once it was measured for long enough."""
        if self.seconds > _SECONDS:
            raise _EnoughError
        return False


def _short(spec: RunSpec, device: str) -> RunSpec:
    """Return a run for the measurement: long enough for it, in smaller batches on a CPU, validated and tested never."""
    batch = spec.recipe.batch_size
    if device == "cpu":
        one = cost.seconds(spec, 1.0, tested=False) / _steps(spec) / batch
        batch = min(batch, max(_SMALL_BATCH, int(_STEP / one)))
    recipe = spec.recipe.model_copy(update={"batch_size": batch, "epochs": 1000, "warmup_epochs": 0.0})
    data = spec.data.model_copy(update={"validation": None})
    return spec.model_copy(update={"recipe": recipe, "data": data})


def _steps(spec: RunSpec) -> int:
    return spec.recipe.epochs * (spec.data.train // spec.recipe.batch_size)
