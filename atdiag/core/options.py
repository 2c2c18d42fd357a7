"""How runs are executed: which device, how many threads, in which parts. Never part of what a run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class ExecutionOptions:
    """The execution options that all experiments share, serialised whole into a worker's order.

    An option is a field here, a flag in ``cli.options`` and the place that uses it; nothing in between names it.
    """

    device: str | None = None
    """cuda, mps or cpu; None: the best that is found where the run runs."""
    threads: int | None = None
    """Threads of one training process on a CPU; None: shared out over the cores."""
    micro_batch: int | None = None
    """Largest number of images that go through a network at once; gradients are accumulated. None: the whole batch."""
    deterministic: bool = False
    """Use deterministic algorithms only: the same bits from a GPU each time."""
    data_dir: str | None = None
    """Folder of all data sets; None: what the environment names where the run runs."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints of a run."""

    def to_json(self) -> dict[str, Any]:
        """Return the options as a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote. Raises TypeError for a field that this version does not know."""
        return cls(**document)
