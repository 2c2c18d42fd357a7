"""Training curves for people: the numbers of ``metrics.jsonl`` as events in ``<run>/tensorboard``, and in W&B if asked.

A convenience: ``metrics.jsonl`` is the record.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch

from atdiag.core.runs import Run


class Board:
    """A run's event file, opened when the first epoch ends, and its run in W&B if ``track`` says so.

    Without the package ``tensorboard``, no events are written.
    """

    def __init__(self, run: Run, track: str | None = None) -> None:
        self._run, self._track = run, track
        self._folder = run.path / "tensorboard"
        self._writer: Any = None
        self._tracker: Any = None
        self._written = 0

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the new lines of a run's metrics.

        A process's first call rewrites all lines and replaces an earlier process's events, so that a run that was
        killed and resumed from an earlier step has a single curve.
        """
        if not self._written:
            self._open()
        for i, line in enumerate(lines[self._written :], self._written):
            told = {name: value for name, value in line.items() if name not in ("epoch", "step")}
            told |= self._system(lines[i - 1] if i else {}, line, now=i + 1 == len(lines))
            if self._writer is not None:
                for name, value in told.items():
                    self._writer.add_scalar(name, value, line["step"])
            if self._tracker is not None:
                self._tracker.log({"epoch": line["epoch"], **told}, line["step"])
        self._written = len(lines)
        if self._writer is not None:
            self._writer.flush()

    def _open(self) -> None:
        if self._track is not None:
            from atdiag.training import tracking

            self._tracker = tracking.begin(self._run)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = SummaryWriter(str(self._folder))

    def _system(self, before: dict[str, Any], line: dict[str, Any], now: bool) -> dict[str, float]:
        """Return the epoch's speed, and for the epoch that has just ended the process's peak memory, in GB."""
        out = {}
        seconds = line["seconds"] - before.get("seconds", 0.0)
        if seconds > 0:
            images = (line["step"] - before.get("step", 0)) * self._run.spec.recipe.batch_size
            out["system/images_per_second"] = images / seconds
        if now and sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
            out["system/memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        if now and torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
            out["system/gpu_memory_gb"] = peak / 1e9
        return out

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.close()
