"""Training curves for TensorBoard: the numbers of ``metrics.jsonl`` as events in ``<run>/tensorboard``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from atdiag.core.runs import Run


class Board:
    """A run's event file, opened when the first epoch ends.

    A convenience: ``metrics.jsonl`` is the record. Without the package ``tensorboard``, nothing is written.
    """

    def __init__(self, run: Run) -> None:
        self._folder = run.path / "tensorboard"
        self._writer: Any = None
        self._written = 0

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the new lines of a run's metrics.

        A process's first call rewrites all lines and replaces an earlier process's events, so that a run that was
        killed and resumed from an earlier step has a single curve.
        """
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder))
        for line in lines[self._written :]:
            for name, value in line.items():
                if name not in ("epoch", "step"):
                    self._writer.add_scalar(name, value, line["step"])
        self._written = len(lines)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
