"""What a training process that failed said last, in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence


def cause(lines: Sequence[str]) -> str | None:
    """Return the last thing said that is no detail: an exception's first line; None if there is nothing.

    A traceback's lines and an exception's further ones are indented. The class of our own errors is left out.
    """
    last = next((line for line in reversed(lines) if line.strip() and not line[0].isspace()), None)
    return None if last is None else re.sub(r"^atdiag\.[\w.]+Error: ", "", last.rstrip())
