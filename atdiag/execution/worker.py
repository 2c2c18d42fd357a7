"""A training process: reads its order, trains cohorts, reports JSON lines on standard output.

``python -m atdiag.execution.worker`` reads the order from standard input and also stops at end of file, since then the
submitting process is gone. ``python -m atdiag.execution.worker ORDER.json`` reads it from a file and runs
independently. Both stop on SIGTERM and SIGUSR1. Whenever a worker stops, every run writes its checkpoint first.

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

from atdiag.execution import followers
from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.turns import train_in_turn

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup

_OUTLIVES = 60.0
"""Seconds by which a rank may outlive the first."""


def main() -> int:
    """Execute one order; return exit code 0 when done (see the statuses), 143 when stopped on request."""
    stop = threading.Event()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), lambda *_: stop.set())
    if len(sys.argv) > 1:
        order = Order.from_json(Path(sys.argv[1]).read_text())
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
        if ranks is None or ranks.first:
            stopped = train_in_turn(order, tell, stop.is_set, ranks)
            return 143 if stopped or stop.is_set() else 0
        return _follow(order, stop.is_set, ranks)


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


if __name__ == "__main__":
    sys.exit(main())
