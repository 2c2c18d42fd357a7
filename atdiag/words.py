"""What is said to the user: errors that name the mend, and "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input: one line that says what was wrong and what to type instead. Exit code 2, nothing written."""

    def __init__(self, problem: str, mend: str | None = None) -> None:
        text = problem if mend is None else f"{problem}{' ' if problem.endswith('?') else ': '}{mend}"
        super().__init__(" ".join(text.splitlines()))


def count(number: int, what: str) -> str:
    """A number of things.

    >>> count(1, "run"), count(2, "process"), count(1000, "seed")
    ('1 run', '2 processes', '1,000 seeds')
    """
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def suggest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?`` where some known name is close, in whatever case, else nothing.

    >>> suggest("Deit_B", ["deit_s", "deit_b"])
    ", did you mean 'deit_b'?"
    """
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f", did you mean {lower[close[0]]!r}?" if close else ""
