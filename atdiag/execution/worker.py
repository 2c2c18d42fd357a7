"""A training process: reads its order, trains cohorts, reports JSON lines on standard output.

``python -m atdiag.execution.worker`` reads the order from standard input and also stops at end of file, since then the
submitting process is gone. ``python -m atdiag.execution.worker ORDER.json`` reads it from a file and runs
independently. Both stop on SIGTERM and SIGUSR1. Whenever a worker stops, every run writes its checkpoint first.

``python -m atdiag.execution.worker --notice SECONDS ORDER.json`` is a task of a SLURM job: it reports a line a minute
for people, and on SIGUSR1, that many seconds before its time limit, it stops and puts itself in the queue again.

For an order of several ranks a worker starts the others (see :mod:`atdiag.execution.followers`); they are workers, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from atdiag.core.errors import FaultError, UserError
from atdiag.core.resources import slurm_job
from atdiag.core.text import duration
from atdiag.execution import followers, slurm_commands, source
from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.turns import train_in_turn

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup

_OUTLIVES = 60.0
"""Seconds by which a rank may outlive the first."""

_SHARE = 0.7
"""Share of the notice after which a task that is still busy, as with a test, is put in the queue as it stands."""


def main() -> int:
    """Execute one order; return exit code 0 when done (see the statuses), 143 when stopped on request.

    2 for an order of another source than this one.
    """
    stop = threading.Event()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), lambda *_: stop.set())
    arguments = sys.argv[1:]
    task = None
    if arguments[:1] == ["--notice"]:
        task = _Task(float(arguments[1]), stop)
        arguments = arguments[2:]
    if arguments:
        order = Order.from_json(Path(arguments[0]).read_text())
        if order.source and order.source != source.digest():
            print(
                f"atdiag here is another than where this was ordered (source {source.digest()[:12]}, ordered with "
                f"{order.source[:12]}; {sys.executable}): install the same on the nodes, or name its Python with "
                "slurm.python",
                file=sys.stderr,
            )
            return 2
    else:
        order = Order.from_json(sys.stdin.readline())
        threading.Thread(target=_until_input_ends, args=(stop,), daemon=True).start()
    # Reserve standard output for reports; redirect what libraries print to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(update: Update) -> None:
        try:
            channel.write(json.dumps(asdict(update)) + "\n")
        except BrokenPipeError:  # the submitting process is gone, though standard input has not ended yet
            stop.set()

    with followers.ranks(order) as ranks:
        if ranks is not None and not ranks.first:
            return _follow(order, stop.is_set, ranks)
        stopped = train_in_turn(order, tell if task is None else task.tell(channel.write), stop.is_set, ranks)
    if task is not None and task.asked:
        task.requeue()
    return 143 if stopped or stop.is_set() else 0


def _follow(order: Order, should_stop: Callable[[], bool], ranks: RankGroup) -> int:
    """Execute an order as one of the ranks after the first, which reports and finds out which rank failed."""
    from atdiag.training.ranks import RankLostError

    try:
        return 143 if train_in_turn(order, lambda update: None, should_stop, ranks) else 0
    except RankLostError as lost:
        print(lost, file=sys.stderr, flush=True)
        os._exit(followers.LOST)  # a kernel of NCCL that waits for the lost rank would not let the process end


def _until_input_ends(stop: threading.Event) -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread blocked in it can crash the interpreter at exit
        pass
    stop.set()
    if os.environ.get("RANK", "0") != "0":  # the first rank is gone: don't outlive it, whatever this one waits for
        time.sleep(_OUTLIVES)
        os._exit(followers.LOST)


class _Task:
    """This process as a task of a SLURM job: its log, and what it does before its time limit."""

    def __init__(self, notice: float, stop: threading.Event) -> None:
        self.notice, self.stop = notice, stop
        self.asked = False
        """Whether the end of the time was announced."""
        self._once = threading.Lock()
        self._began = time.monotonic()
        self._said = -60.0
        self._images = 0
        signal.signal(signal.SIGUSR1, self._announced)

    def tell(self, write: Callable[[str], object]) -> Callable[[Update], None]:
        """Return the callback that writes a line a minute, and one for each run that ends."""

        def tell(update: Update) -> None:
            now, at = update.progress, time.monotonic()
            self._images = now.images
            ended = [f"run {run} {status}" for run, status in update.statuses.items()]
            if ended or at - self._said >= 60:
                self._said = at
                rate = f", {now.images / (at - self._began):.0f} images/s" if now.images else ""
                write("; ".join([f"{now.done:,}/{now.total:,} steps{rate}", *ended, *filter(None, [now.doing])]) + "\n")

        return tell

    def requeue(self) -> None:
        """Put this task in the queue again, once; not if it took no step, since then it never would."""
        if not self._once.acquire(blocking=False):
            return
        if not self._images:
            self._say("the time limit is too short for one step: give more with slurm.time")
            return
        job = slurm_job()
        self._say(f"the time limit is near: SLURM task {job} goes back to the queue after {self._took()}")
        try:
            if job is not None:
                slurm_commands.requeue(job)
        except (UserError, FaultError) as fault:  # the checkpoints are there: the same line submits them again
            self._say(f"it can't be put in the queue ({fault}): type the same command again")

    def _announced(self, *_: object) -> None:
        self.asked = True
        self.stop.set()
        timer = threading.Timer(self.notice * _SHARE, self.requeue)
        timer.daemon = True
        timer.start()

    def _took(self) -> str:
        return duration(time.monotonic() - self._began)

    def _say(self, text: str) -> None:
        print(f"atdiag: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
