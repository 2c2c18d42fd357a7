"""Progress of a running task, and the callback that reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Units done and in total (steps, evaluations), and a description of the task.

    images: number of images that have passed through a student since the start.
    """

    done: int
    total: int
    images: int = 0
    doing: str = ""


OnProgress = Callable[[Progress], None]
"""Progress callback."""


def ignore(progress: Progress) -> None:
    """Report nothing: the default callback."""
