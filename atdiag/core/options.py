"""Options for executing runs: device, threads, micro-batch. Never part of a run's spec."""

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
    """cuda, mps or cpu; None: the best device on the machine where the run executes."""
    devices: str | None = None
    """GPUs to use: how many (``8``), or which of the visible ones (``0,2``; ``2,`` is the third alone). None: all."""
    per_device: int | None = None
    """Training processes on each device; None: one, or on a CPU as many as fit its cores."""
    threads: int | None = None
    """Threads of one training process on a CPU; None: the cores divided among the processes."""
    micro_batch: int | None = None
    """Maximum images per forward pass; gradients are accumulated. None: the whole batch."""
    deterministic: bool = False
    """Use deterministic algorithms only: bitwise reproducible results on a GPU."""
    ranks: int = 1
    """Processes that train each run together, every one on a device of its own and on its share of every batch."""
    data_dir: str | None = None
    """Folder of all data sets; None: from the environment where the run executes."""
    track: str | None = None
    """Where training is shown besides TensorBoard: ``wandb``; None: nowhere."""
    checkpoint_seconds: float = 30.0
    """Minimum time between two checkpoints of a run."""

    def to_json(self) -> dict[str, Any]:
        """Return the options as a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote. Raises TypeError for a field that this version does not know."""
        return cls(**document)
