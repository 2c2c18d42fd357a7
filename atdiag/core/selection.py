"""Parse choices typed by the user: one of several names, lists of names, blocks and heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from atdiag.core.errors import UserError, suggest

_ENDS = {"bottom": "first", "first": "first", "top": "last", "last": "last"}


def choose(value: str, allowed: Sequence[str], argument: str) -> str:
    """Return ``value`` if it is allowed. Raises UserError, with "did you mean", otherwise."""
    if value not in allowed:
        raise UserError(f"`{argument}` {value!r}{suggest(value, allowed)} (choose from: {', '.join(allowed)})")
    return value


def comma_separated(text: str, argument: str, example: str) -> tuple[str, ...]:
    """Split ``a, b`` into its parts, without duplicates. Raises UserError if there are none."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"`{argument}` is empty", f"write it as '{example}'")
    return parts


def indices(text: str | int | tuple[int, ...] | None, count: int, name: str) -> tuple[int, ...]:
    """Parse ``3,5,7-9``, ``top:6``, ``bottom:6`` (also ``last:6``, ``first:6``) or None (all): indices below ``count``.

    ``bottom:21/24`` is that share of all, rounded down.

    Raises UserError that says what is wrong.

    >>> indices("0,3-5", 12, "transfer.layers"), indices("top:2", 12, "transfer.layers")
    ((0, 3, 4, 5), (10, 11))
    """
    if text is None:
        return tuple(range(count))
    text = ",".join(map(str, text)) if isinstance(text, tuple) else str(text)
    ends = ("first:2", "last:2") if name.endswith("heads") else ("top:6", "bottom:6")
    asked = f"`{name}`={text}"
    hint = f"write it as '3,5,7-9', '{ends[0]}' or '{ends[1]}'"
    if end := re.fullmatch(r"\s*([a-z]+)\s*:\s*(\d+)\s*(?:/\s*(\d+)\s*)?", text):
        word, number = end[1], int(end[2])
        if end[3] is not None:
            if not 0 < number <= int(end[3]):
                raise UserError(f"{asked}: {number}/{end[3]} is no share of all", hint)
            number = max(1, count * number // int(end[3]))
        if word not in _ENDS:
            raise UserError(f"{asked}: unknown word {word!r}{suggest(word, _ENDS)}", hint)
        if not 1 <= number <= count:
            raise UserError(f"{asked}: there are only {count}", f"give a number from 1 to {count}")
        return tuple(range(number) if _ENDS[word] == "first" else range(count - number, count))
    found: set[int] = set()
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)):
            raise UserError(f"{asked}: {part.strip()!r} is neither a number nor a range", hint)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{asked}: the range {part.strip()} runs backwards", f"write it as '{last}-{first}'")
        if last >= count:
            raise UserError(f"{asked}: {last} is out of range", f"give numbers from 0 to {count - 1}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def ranges(indices: Iterable[int]) -> str:
    """Format indices as :func:`indices` parses them, with consecutive ones as a range.

    >>> ranges((0, 1, 2, 5, 7, 8))
    '0-2,5,7-8'
    """
    out: list[tuple[int, int]] = []
    for index in indices:
        if out and out[-1][1] == index - 1:
            out[-1] = out[-1][0], index
        else:
            out.append((index, index))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in out)
