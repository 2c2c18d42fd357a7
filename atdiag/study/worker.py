"""One training process: reads its order from standard input, trains cohorts, reports JSON lines on standard output.

Started by ``schedule``; not for use by hand. It stops, with every run's checkpoint written, on SIGTERM and when its
standard input ends, because then whoever ordered the work is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Do one order. Exit code 0: done (see the statuses), 143: stopped on request."""
    order = json.loads(sys.stdin.readline())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: a thread that waits in it can crash the interpreter's own end
            pass
        stop.set()

    threading.Thread(target=watch, daemon=True).start()

    # Standard output is the report channel: keep it for that, and send what libraries print to standard error.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    from atdiag.networks import weights
    from atdiag.runs import Store
    from atdiag.spec import RunSpec
    from atdiag.training import cohort

    if order["threads"]:
        torch.set_num_threads(order["threads"])
    device = torch.device(order["device"])
    specs = [[RunSpec.model_validate(document) for document in group] for group in order["cohorts"]]
    steps = [sum(s.recipe.epochs * (s.data.train // s.recipe.batch_size) for s in group) for group in specs]

    def tell(message: dict[str, Any]) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
        except BrokenPipeError:  # whoever ordered the work is gone, and standard input just has not said so yet
            stop.set()

    store = Store(Path(order["runs"]))
    images = done = 0  # of the cohorts that are through
    for group, total in zip(specs, steps, strict=True):
        last = cohort.Progress(0, total, 0, "starting")
        told = 0.0

        def report(now: cohort.Progress, done: int = done, images: int = images, total: int = total) -> None:
            nonlocal last, told
            last = now
            if time.monotonic() - told > 0.2 or now.doing != "training":
                told = time.monotonic()
                at = done + total - (now.total - now.done)  # runs that were finished before are not in now.total
                tell({"done": at, "total": sum(steps), "images": images + now.images, "doing": now.doing})

        status = cohort.train(
            group,
            store,
            weights.load,
            device,
            report,
            stop.is_set,
            processes=order["processes"],
            command=order["command"],
            micro_batch=order["micro_batch"],
            deterministic=order["deterministic"],
        )
        done, images = done + total, images + last.images
        tell({"status": status})
        if stop.is_set():
            return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
