"""A command under torchrun: rank 0 runs it, and the other ranks train with it as it tells them.

Imports nothing heavy unless torchrun, or a launcher that sets the same environment, has started this process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.execution.inprocess import InProcessExecutor
from atdiag.execution.order import Order
from atdiag.execution.plan import Job
from atdiag.execution.turns import train_in_turn

if TYPE_CHECKING:
    from atdiag.training.ranks import RankGroup

_SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.1
"""Seconds between two looks for an order."""
_PATIENCE = 5.0
"""Seconds for which ranks wait for each other's end."""


def world() -> int:
    """Return how many ranks torchrun has started together with this process; 1 if it did not."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _SET) else 1


def ranks(asked: int) -> int:
    """Return how many ranks train a run: all that torchrun started, else as many as asked for.

    Raises UserError if the two differ.
    """
    if (started := world()) == 1:
        return asked
    if asked not in (1, started):
        raise UserError(f"`ranks` {asked}, but torchrun has started {started}", "leave `ranks` out")
    return started


@dataclass
class _Company:
    """The ranks that torchrun started, and the store through which the first one talks to the others."""

    ranks: RankGroup
    store: Any
    orders: int = 0

    def order(self, order: Order) -> None:
        self.store.set(f"order/{self.orders}", order.to_json())
        self.orders += 1


_joined: list[_Company] = []


def join() -> bool:
    """Meet the other ranks, and return whether this is the first, which runs the command."""
    from atdiag.training import ranks as training

    _joined.append(_Company(*training.join()))
    return _joined[0].ranks.first


def executor() -> InProcessExecutor | None:
    """Return what trains under torchrun; None without it. Raises UserError where no command line leads the ranks."""
    if world() == 1:
        return None
    if not _joined or not _joined[0].ranks.first:
        raise UserError(
            "torchrun has started this program several times, and each would train by itself",
            "start it once, with `ranks`; torchrun is for 'atdiag' commands",
        )
    return TorchrunExecutor(_joined[0])


class TorchrunExecutor(InProcessExecutor):
    """Executes jobs in turn in this process, the first rank, and in those that :func:`follow` it."""

    takes_ranks = True

    def __init__(self, company: _Company) -> None:
        super().__init__()
        self._company, self._ranks = company, company.ranks

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Start training, here and in the other ranks."""
        options = replace(options, ranks=self._company.ranks.count)
        self._company.order(self._order(jobs, store, options))
        super().submit(jobs, store, options)


def follow() -> int:
    """Execute the first rank's orders until it ends, and return its exit code. Stops all ranks on SIGTERM or SIGUSR1.

    Raises what :func:`~atdiag.execution.turns.train_in_turn` raises, unless the first rank has failed, too, and told.
    """
    stop = threading.Event()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: stop.set())
    company = _joined[0]
    while True:
        while not company.store.check([f"order/{company.orders}"]):
            if (code := _end(company)) is not None:
                return code
            if stop.is_set():
                return 143
            time.sleep(_POLL)
        order = Order.from_json(company.store.get(f"order/{company.orders}").decode())
        company.orders += 1
        try:
            train_in_turn(order, lambda update: None, stop.is_set, company.ranks)
        except Exception:
            until = time.monotonic() + _PATIENCE
            while time.monotonic() < until:
                if (code := _end(company)) is not None:
                    return code
                time.sleep(_POLL)
            raise


def _end(company: _Company) -> int | None:
    """Return the first rank's exit code, once it ends, and tell it that this one knows."""
    if not company.store.check(["end"]):
        return None
    code = int(company.store.get("end"))
    company.store.add("ended", 1)
    return code


def dismiss(code: int) -> None:
    """Tell the other ranks that the command ends with an exit code, and wait briefly until they know."""
    company = _joined[0]
    try:
        company.store.set("end", str(code))
        until = time.monotonic() + _PATIENCE
        while company.store.add("ended", 0) < company.ranks.count - 1 and time.monotonic() < until:
            time.sleep(_POLL)
    except RuntimeError:  # the store was another rank's, which is gone
        pass
