"""Train the cohorts of an order in turn, and report progress over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from atdiag.core import paths
from atdiag.core.progress import Progress
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.execution import devices
from atdiag.execution.executor import Update
from atdiag.execution.order import Order

_INTERVAL = 0.2
"""Minimum seconds between two updates within a cohort's training."""


def train_in_turn(order: Order, tell: Callable[[Update], None], should_stop: Callable[[], bool]) -> None:
    """Execute an order until done or stopped. Raises what :func:`atdiag.training.cohort.train` raises.

    tell: callback (update), called at intervals while a cohort trains and with each cohort's statuses at its end.
    """
    import torch

    from atdiag.networks.weights import loading
    from atdiag.training import cohort

    options = replace(order.options, device=devices.resolve(order.options.device))
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    meter = _Meter([steps(group) for group in order.cohorts], tell)
    try:
        with paths.looking_in(options.data_dir):
            for group in order.cohorts:
                statuses = cohort.train(
                    group,
                    Store(order.runs),
                    loading.load,
                    options,
                    meter.report,
                    should_stop,
                    processes=order.processes,
                    command=order.command,
                )
                meter.end_cohort(statuses)
                if should_stop():
                    return
    finally:
        torch.set_num_threads(before)


def steps(cohort: Sequence[RunSpec]) -> int:
    """Return the optimisation steps of a cohort's runs together."""
    return sum(spec.recipe.epochs * (spec.data.train // spec.recipe.batch_size) for spec in cohort)


class _Meter:
    """Progress over all cohorts, computed from that of the current one."""

    def __init__(self, steps: Sequence[int], tell: Callable[[Update], None]) -> None:
        self.steps, self.tell = steps, tell
        self.cohort = self.images = 0
        self.last = Progress(0, 0)
        self.told = 0.0

    def report(self, now: Progress) -> None:
        self.last = now
        if time.monotonic() - self.told > _INTERVAL or now.doing != "training":
            self.told = time.monotonic()
            self.tell(Update(self._overall()))

    def end_cohort(self, statuses: Mapping[str, str]) -> None:
        self.images += self.last.images
        self.cohort += 1
        self.last = Progress(0, 0)
        self.tell(Update(self._overall(), statuses))

    def _overall(self) -> Progress:
        done = sum(self.steps[: self.cohort])
        if self.cohort < len(self.steps):  # runs that were already finished are not in the cohort's own total
            done += self.steps[self.cohort] - (self.last.total - self.last.done)
        return Progress(done, sum(self.steps), self.images + self.last.images, self.last.doing)
