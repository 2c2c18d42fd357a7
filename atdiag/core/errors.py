"""Errors with a remedy, and "did you mean" suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input: one line that says what was wrong and what to type instead. Exit code 2, nothing written."""

    def __init__(self, problem: str, hint: str | None = None) -> None:
        text = problem if hint is None else f"{problem}{' ' if problem.endswith('?') else ': '}{hint}"
        super().__init__(" ".join(text.splitlines()))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean 'x'?`` for the closest known name, ignoring case, or an empty string.

    >>> suggest("Deit_B", ["deit_s", "deit_b"])
    ", did you mean 'deit_b'?"
    """
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f", did you mean {lower[close[0]]!r}?" if close else ""


class FaultError(RuntimeError):
    """A failure at run time; finished work is kept, and the next start resumes from there."""


class StoppedError(RuntimeError):
    """The user or the system asked to stop; every active run wrote its checkpoint."""
