"""Train the cohorts of an order in turn, and report progress over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from atdiag.core import paths
from atdiag.core.progress import Progress
from atdiag.core.resources import available_cores
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.execution import devices
from atdiag.execution.executor import Update
from atdiag.execution.order import Order

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup

_INTERVAL = 0.2
"""Minimum seconds between two updates within a cohort's training."""


def train_in_turn(
    order: Order, tell: Callable[[Update], None], should_stop: Callable[[], bool], ranks: RankGroup | None = None
) -> bool:
    """Execute an order until done or stopped, and return whether it was asked to stop.

    tell: callback (update), called at intervals while a cohort trains and with each cohort's statuses at its end.
    ranks: this process's place among those that execute the order together; None: it is alone. Each must be asked to
    execute it, and only one need be asked to stop. Raises what :func:`atdiag.training.cohort.train` raises.
    """
    import torch

    from atdiag.networks.weights import loading
    from atdiag.training import cohort
    from atdiag.training.ranks import ALONE

    ranks = ranks or ALONE
    options = replace(order.options, device=devices.resolve(order.options.device))
    before = torch.get_num_threads()
    if options.threads is None and ranks.count > 1:
        options = replace(options, threads=max(1, available_cores() // (order.processes * ranks.here)))
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
                    ranks=ranks,
                )
                meter.end_cohort(statuses)
                with ranks.watched():
                    (stopped,) = ranks.agree(should_stop())
                if stopped:
                    return True
    finally:
        torch.set_num_threads(before)
    return False


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
