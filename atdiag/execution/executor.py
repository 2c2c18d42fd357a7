"""What executes jobs: an executor takes them, tells how far they are, and can be told to stop.

It never decides what is done: that is read from run directories alone.
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
    """What an executor tells when it is asked: progress over all jobs, and what became of runs, by id."""

    progress: Progress
    statuses: Mapping[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """Somewhere that jobs can be executed: in this process, in others of this machine, on a cluster."""

    def processes(self, options: ExecutionOptions) -> int:
        """Return how many jobs run side by side. Raises UserError where the options can't be met."""

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Begin to execute jobs."""

    def poll(self) -> Update | None:
        """Wait a moment for news; None once every job has ended.

        Raises FaultError where a job ended by a fault, StoppedError where it was asked to stop.
        """

    def cancel(self) -> None:
        """Stop what is under way, with a checkpoint written for every run. Does nothing after the end."""
