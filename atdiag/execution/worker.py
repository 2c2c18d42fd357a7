"""One training process: reads its order, trains cohorts, reports JSON lines on standard output.

``python -m atdiag.execution.worker`` reads the order from standard input and also stops when that ends, because then
whoever ordered the work is gone. ``python -m atdiag.execution.worker ORDER.json`` reads it from a file and depends on
nobody. Either stops, with every run's checkpoint written, on SIGTERM.
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
    """Do one order. Exit code 0: done (see the statuses), 143: stopped on request."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    if len(sys.argv) > 1:
        order = Order.from_json(Path(sys.argv[1]).read_text())
    else:
        order = Order.from_json(sys.stdin.readline())
        threading.Thread(target=_until_input_ends, args=(stop,), daemon=True).start()
    # Standard output is the report channel: keep it for that, and send what libraries print to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(update: Update) -> None:
        try:
            channel.write(json.dumps(asdict(update)) + "\n")
        except BrokenPipeError:  # whoever ordered the work is gone, and standard input just has not said so yet
            stop.set()

    train_in_turn(order, tell, stop.is_set)
    return 143 if stop.is_set() else 0


def _until_input_ends(stop: threading.Event) -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread that waits in it can crash the interpreter's own end
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
