"""How far something is, as it is reported while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Units done and to do (steps, evaluations), and what is being done.

    images: how many went through a student since the start.
    """

    done: int
    total: int
    images: int = 0
    doing: str = ""


OnProgress = Callable[[Progress], None]
"""Progress callback."""


def ignore(progress: Progress) -> None:
    """Report nothing: the default callback."""
