"""Format numbers and names for readers."""

from __future__ import annotations

from collections.abc import Iterable


def count(number: int, what: str) -> str:
    """Format a number of things.

    >>> count(1, "run"), count(2, "process"), count(1000, "seed")
    ('1 run', '2 processes', '1,000 seeds')
    """
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def shortlist(names: Iterable[str], most: int = 5) -> str:
    """Format the first few names, and the number of the rest.

    >>> shortlist(["a", "b", "c"], most=2), shortlist(["a"]), shortlist([])
    ('a, b and 1 more', 'a', 'nothing')
    """
    some = list(names)
    if not some:
        return "nothing"
    return ", ".join(some[:most]) + (f" and {len(some) - most} more" if len(some) > most else "")


def listed(names: Iterable[str]) -> str:
    """Format names as a phrase.

    >>> listed(["a", "b", "c"]), listed(["a"]), listed([])
    ('a, b and c', 'a', '')
    """
    *others, last = [*names] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def printable(text: str) -> str:
    r"""Escape what can't be printed in a name: control characters, and bytes that are not text.

    >>> print(printable("one" + chr(10) + "two"))
    one\ntwo
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def duration(seconds: float) -> str:
    """Format a duration as ``40 s``, ``12 min``, ``3.5 h`` or ``4 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} days"


def byte_size(count: int) -> str:
    """Format a number of bytes.

    >>> byte_size(5_408), byte_size(12_345_678), byte_size(6_609_200_000)
    ('5.4 kB', '12.3 MB', '6.6 GB')
    """
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
