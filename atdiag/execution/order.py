"""The order for a training process: a JSON document, the same for every executor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from atdiag.core.options import ExecutionOptions
from atdiag.core.spec import RunSpec


@dataclass(frozen=True)
class Order:
    """Cohorts to train in turn, the folder of their runs, and the execution options.

    processes: number of such processes that share the machine. command: the command line to record in the runs.
    source: the hash of the source that may execute it (:func:`atdiag.execution.source.digest`); empty: any.
    """

    runs: Path
    options: ExecutionOptions
    processes: int
    command: tuple[str, ...]
    cohorts: tuple[tuple[RunSpec, ...], ...]
    source: str = ""

    def to_json(self) -> str:
        """Return the order as one line of JSON."""
        return json.dumps(
            {
                "runs": str(self.runs),
                "options": self.options.to_json(),
                "processes": self.processes,
                "command": self.command,
                "source": self.source,
                "cohorts": [[spec.model_dump(mode="json") for spec in cohort] for cohort in self.cohorts],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        document = json.loads(text)
        return cls(
            runs=Path(document["runs"]),
            options=ExecutionOptions.from_json(document["options"]),
            processes=document["processes"],
            command=tuple(document["command"]),
            source=document.get("source", ""),
            cohorts=tuple(tuple(map(RunSpec.model_validate, cohort)) for cohort in document["cohorts"]),
        )
