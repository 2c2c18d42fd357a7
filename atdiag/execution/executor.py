"""The executor protocol: submit jobs, poll their progress, cancel them.

An executor never decides what is finished: that is read from run directories alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import Progress
from atdiag.core.runs import Store
from atdiag.execution.plan import Job


@dataclass(frozen=True)
class Update:
    """News from an executor: progress over all jobs, and the status of runs that ended, by id."""

    progress: Progress
    statuses: Mapping[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """A place to execute jobs: this process, other processes of this machine, a cluster.

    One that can train a run over several ranks says so by an attribute ``takes_ranks``, True.
    """

    def processes(self, options: ExecutionOptions) -> int:
        """Return how many jobs run side by side. Raises UserError for options that can't be met."""

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Start executing jobs."""

    def poll(self) -> Update | None:
        """Wait briefly for news; None once every job has ended.

        Raises FaultError if a job failed, StoppedError if it was stopped on request.
        """

    def cancel(self) -> None:
        """Stop running jobs after every run has written a checkpoint. Does nothing once all jobs have ended."""
