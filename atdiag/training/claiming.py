"""Claim runs for training: their directories, made and locked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

from atdiag.core.runs import DamagedRunError, RunBusyError, Store
from atdiag.core.spec import RunSpec
from atdiag.data import sources

Status = Literal["finished", "failed", "interrupted", "busy"]


def claim(specs: Sequence[RunSpec], store: Store, locks: ExitStack) -> dict[str, Status]:
    """Create and lock the runs that are to be trained, and return the status of the others.

    locks: holds the locks of the runs that are to be trained. Raises UserError or ValueError, with nothing written, for
    runs that can't be trained, or not together.
    """
    for spec in specs:
        sources.find(spec.data).check(spec.data, spec.network)
    if len({spec.stream for spec in specs}) > 1 or len({s.teacher.seen_as for s in specs if s.teacher}) > 1:
        raise ValueError("the runs of a cohort share one data stream and one teacher")
    status: dict[str, Status] = {}
    for spec in specs:
        try:
            run = store.create(spec)
            locks.enter_context(run.lock())
        except RunBusyError:
            status[spec.id] = "busy"
        except DamagedRunError as fault:
            store.run(spec).fail(0, str(fault))
            status[spec.id] = "failed"
        else:
            if run.finished:
                status[spec.id] = "finished"
    return status
