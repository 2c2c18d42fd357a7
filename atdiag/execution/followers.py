"""The further ranks of a training process: workers like itself, which it starts, and ends with."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from atdiag.core.errors import FaultError
from atdiag.execution.order import Order

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup

LOST = 3
"""Exit code of a rank that stopped because another one did."""

_LAST_WORDS = 30
"""Lines kept of a follower's standard error."""

_GRACE = 10.0
"""Seconds for a rank to notice that another one has ended."""


@contextlib.contextmanager
def ranks(order: Order) -> Iterator[RankGroup | None]:
    """Give an order's training process its place among the ranks; None if it is alone.

    Unless it was itself started as one of them, by torchrun or by this function, it becomes the first and starts the
    others. Raises FaultError, with its cause, for a rank that failed.
    """
    count = order.options.ranks
    if count == 1:
        yield None
        return
    from atdiag.training import ranks as training

    if os.environ.get("WORLD_SIZE") == str(count) and {training.MEETING, "MASTER_PORT"} & os.environ.keys():
        yield training.join()[0]
        return
    with tempfile.TemporaryDirectory(prefix="atdiag-", ignore_cleanup_errors=True) as folder:
        place = {"WORLD_SIZE": str(count), training.MEETING: str(Path(folder) / "meeting")}
        if sys.platform == "linux":  # else gloo looks for the interface of the host's name, which may have none
            place["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        followers = _Followers([_start(order, place | _place(rank)) for rank in range(1, count)])
        os.environ.update(place | _place(0))
        try:
            yield training.join()[0]
        except training.RankLostError as lost:
            raise FaultError(followers.cause() or str(lost)) from lost
        finally:
            followers.leave()


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _start(order: Order, place: dict[str, str]) -> subprocess.Popen[str]:
    follower = subprocess.Popen(
        [sys.executable, "-P", "-m", "atdiag.execution.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **place},
    )
    assert follower.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead: told as any other
        follower.stdin.write(order.to_json() + "\n")
        follower.stdin.flush()  # left open: end of file tells it that this process is gone
    return follower


class _Followers:
    """Processes of the ranks after the first, and why one of them failed."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._words: list[list[str]] = [[] for _ in processes]
        self._noticed = threading.Event()
        """Set once this process knows of a failure, or leaves."""
        self._threads = [threading.Thread(target=self._watch, args=(i,), daemon=True) for i in range(len(processes))]
        for thread in self._threads:
            thread.start()

    def cause(self) -> str | None:
        """Return why the first follower failed that did not merely stop because of another; None if none did."""
        self._noticed.set()
        end = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for index, process in enumerate(self._processes):
            if process.poll() not in (None, 0, LOST, 143):
                print(*self._words[index], sep="\n", file=sys.stderr)
                return self._why(index)
        return None

    def _why(self, index: int) -> str:
        """Return in one line why a follower failed: the first line of its exception, if any."""
        code = self._processes[index].returncode
        if code < 0:
            return f"rank {index + 1} was ended by {signal.Signals(-code).name}"
        lines = [line for line in self._words[index] if line.strip() and not line[0].isspace()]
        last = lines[-1] if lines else f"exit code {code}"
        return f"rank {index + 1}: " + re.sub(r"^atdiag\.[\w.]+Error: ", "", last)

    def leave(self) -> None:
        """End with the followers: give them time to end by themselves, then kill them."""
        self._noticed.set()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, index: int) -> None:
        """Keep a follower's last words, and end this process if it does not notice that the follower has failed.

        That is so before the ranks have met, or while this one waits in NCCL.
        """
        process = self._processes[index]
        assert process.stderr is not None
        for line in process.stderr:
            self._words[index] = [*self._words[index][-_LAST_WORDS:], line.rstrip()]
        if process.wait() in (0, 143):
            return
        if not self._noticed.wait(_GRACE):
            print(*self._words[index], self._why(index), sep="\n", file=sys.stderr, flush=True)
            os._exit(1)
