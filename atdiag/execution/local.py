"""Execute jobs in processes on this machine: on a CPU one for each job, on several GPUs one for each cohort."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from atdiag.core import resources
from atdiag.core.errors import FaultError, StoppedError
from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import Progress
from atdiag.core.runs import Store
from atdiag.execution import devices, last_words, plan, turns
from atdiag.execution.dispatch import Dispatch
from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.plan import Job

_LAST_WORDS = 30
"""Lines kept of a worker's standard error."""


class LocalExecutor:
    """Worker processes on this machine. If this process dies, they write checkpoints and stop."""

    takes_ranks = True

    def __init__(self) -> None:
        self._workers: dict[int, subprocess.Popen[str]] = {}
        self._orders: list[Order] = []
        self._slots: list[dict[str, str]] = []
        self._queue = Dispatch(0, 0)
        self._messages: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self._errors: list[list[str]] = []
        self._latest: dict[int, Progress] = {}
        self._store: Store | None = None

    def processes(self, options: ExecutionOptions) -> int:
        """Return how many training processes fit the devices. Raises UserError for one that is not on this machine."""
        return len(devices.slots(options))

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Start a process for each job; on several GPUs for each cohort, the next where a device is free."""
        self._slots = devices.slots(options)
        options = replace(options, device=devices.resolve(options.device))
        if options.device == "cpu":
            if options.threads is None and options.per_device is not None:
                options = replace(options, threads=max(1, resources.available_cores() // len(self._slots)))
        elif len(self._slots) > 1:
            jobs = plan.single(jobs)
        runs, command = store.root.resolve(), tuple(sys.argv)
        side_by_side = min(len(self._slots), len(jobs))
        self._store, self._errors = store, [[] for _ in jobs]
        self._latest = {i: Progress(0, sum(map(turns.steps, job.cohorts))) for i, job in enumerate(jobs)}
        self._orders = [Order(runs, options, side_by_side, command, job.cohorts) for job in jobs]
        self._workers, self._queue = {}, Dispatch(len(jobs), len(self._slots))
        self._start_next()

    def poll(self) -> Update | None:
        """Wait up to half a second for a message from any worker."""
        if self._queue.over:
            return None
        statuses: dict[str, str] = {}
        doing = ""
        with contextlib.suppress(Empty):
            index, message = self._messages.get(timeout=0.5)
            if message is None:
                self._queue.ended(index)
                self._ended(index, self._workers[index].wait())
                self._start_next()
            else:
                self._latest[index] = Progress(**message["progress"])
                statuses, doing = message["statuses"], self._latest[index].doing
        latest = self._latest.values()
        done, total, images = (sum(getattr(one, what) for one in latest) for what in ("done", "total", "images"))
        return Update(Progress(done, total, images, doing), statuses)

    def cancel(self) -> None:
        """Ask every worker to write its checkpoints and stop, and wait for it."""
        for worker in self._workers.values():
            if worker.poll() is None:
                worker.terminate()
        for worker in self._workers.values():
            try:
                worker.wait(timeout=60)
            except subprocess.TimeoutExpired:
                worker.kill()
        self._queue = Dispatch(0, 0)

    def _start_next(self) -> None:
        """Start the jobs for which there is a place."""
        for index, place in self._queue.starts():
            self._workers[index] = self._start(index, self._orders[index], self._slots[place])

    def _start(self, index: int, order: Order, more: dict[str, str]) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "atdiag.execution.worker"],  # -P: don't import from the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **more},
            start_new_session=True,  # Ctrl-C reaches the workers through us, once
        )
        assert worker.stdin is not None
        worker.stdin.write(order.to_json() + "\n")
        worker.stdin.flush()  # left open: end of file tells the worker that this process is gone

        def keep_errors() -> None:
            assert worker.stderr is not None
            for line in worker.stderr:
                self._errors[index] = [*self._errors[index][-_LAST_WORDS:], line.rstrip()]

        errors = threading.Thread(target=keep_errors, daemon=True)
        errors.start()

        def listen() -> None:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    with contextlib.suppress(json.JSONDecodeError):  # a line that a library printed
                        self._messages.put((index, json.loads(line)))
            finally:
                errors.join()  # read all of its standard error before reporting its end
                self._messages.put((index, None))

        threading.Thread(target=listen, daemon=True).start()
        return worker

    def _ended(self, index: int, code: int) -> None:
        """Raise the error for a worker's exit code; none for 0."""
        if code == 0:
            return
        if code == 143:
            raise StoppedError("a training process was asked to stop")
        words = [line for line in self._errors[index] if line.strip()]
        if code < 0:
            last = f"it was ended by {signal.Signals(-code).name}"
            last += " (out of memory?)" if code == -signal.SIGKILL else ""
        else:
            last = last_words.cause(words) or f"exit code {code}"
        assert self._store is not None
        log = self._store.root / "last-fault.log"
        try:
            log.write_text("\n".join([*words, last]) + "\n")
            where = f" (its last output is in {log})"
        except OSError:  # the error may be that this folder can't be written
            where = ""
        raise FaultError(f"a training process failed: {last}{where}; the same command goes on from there")
