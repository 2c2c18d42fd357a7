"""A training process: reads its order, trains cohorts, reports JSON lines on standard output.

``python -m atdiag.execution.worker`` reads the order from standard input and also stops at end of file, since then the
submitting process is gone. ``python -m atdiag.execution.worker ORDER.json`` reads it from a file and runs
independently. Both stop on SIGTERM. Whenever a worker stops, every run writes its checkpoint first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.turns import train_in_turn


def main() -> int:
    """Execute one order; return exit code 0 when done (see the statuses), 143 when stopped on request."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
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

    train_in_turn(order, tell, stop.is_set)
    return 143 if stop.is_set() else 0


def _until_input_ends(stop: threading.Event) -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread blocked in it can crash the interpreter at exit
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
