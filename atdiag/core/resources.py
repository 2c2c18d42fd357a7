"""Sizes are looked at before room is made: a file or a spec may ask for anything."""

from __future__ import annotations

import os
from pathlib import Path

from atdiag.core.errors import UserError

MIB, GIB = 2**20, 2**30


def memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def room(need: float, what: str, hint: str | None = None) -> None:
    """Raise UserError where ``what`` takes more bytes than this machine has memory, before any of them is asked for."""
    have = memory()
    if have is not None and need > have:
        raise UserError(
            f"{what} take {need / GIB:,.1f} GiB of memory, but this machine has only {have / GIB:,.1f}", hint
        )


def small_file(path: Path, most: int = 16 * MIB) -> bytes:
    """The bytes of a file that has no reason to be large.

    Raises ValueError for one of more than ``most`` bytes, of which no more than that is read, and OSError.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most / MIB:,.0f} MiB, too large for such a file")
    return content


def available_cores() -> int:
    """Cores that this process may use (affinity and SLURM's cgroups respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
