"""Execute jobs in a thread of this process: for notebooks, debuggers, and places where processes can't be started."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from atdiag.core.errors import StoppedError
from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import Progress
from atdiag.core.runs import Store
from atdiag.execution import devices
from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.plan import Job
from atdiag.execution.turns import train_in_turn

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup


class InProcessExecutor:
    """One thread that executes all jobs in turn."""

    def __init__(self) -> None:
        self._news: SimpleQueue[Update | BaseException | None] = SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._latest = Progress(0, 0)
        self._ranks: RankGroup | None = None

    def processes(self, options: ExecutionOptions) -> int:
        """Return 1. Raises UserError for a device that is not on this machine."""
        devices.resolve(options.device)
        return 1

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Start the thread."""
        order = self._order(jobs, store, options)
        self._stop.clear()
        self._news, self._latest = SimpleQueue(), Progress(0, 0)  # messages left by earlier, cancelled jobs
        context = contextvars.copy_context()  # includes the folder of data sets
        self._thread = threading.Thread(target=context.run, args=(self._work, order), daemon=True)
        self._thread.start()

    def poll(self) -> Update | None:
        """Wait up to half a second for news."""
        if self._thread is None:
            return None
        try:
            news = self._news.get(timeout=0.5)
        except Empty:
            return Update(self._latest)
        if isinstance(news, Update):
            self._latest = news.progress
            return news
        self._thread.join()
        self._thread = None
        if news is not None:
            raise news
        return None

    def cancel(self) -> None:
        """Ask the thread to write checkpoints and stop, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _order(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> Order:
        cohorts = tuple(cohort for job in jobs for cohort in job.cohorts)
        return Order(store.root.resolve(), options, processes=1, command=tuple(sys.argv), cohorts=cohorts)

    def _work(self, order: Order) -> None:
        try:
            if train_in_turn(order, self._news.put, self._stop.is_set, self._ranks):
                raise StoppedError("the training was asked to stop")
        except BaseException as fault:  # re-raised by poll
            self._news.put(fault)
        else:
            self._news.put(None)
