"""Check sizes before allocating memory: a file or a spec may declare anything."""

from __future__ import annotations

import os
from pathlib import Path

from atdiag.core.errors import UserError

MIB, GIB = 2**20, 2**30


def memory() -> int | None:
    """Return this machine's memory in bytes; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def room(need: float, what: str, hint: str | None = None) -> None:
    """Raise UserError if ``what`` needs more bytes than this machine has memory; call before allocating."""
    have = memory()
    if have is not None and need > have:
        raise UserError(
            f"{what} take {need / GIB:,.1f} GiB of memory, but this machine has only {have / GIB:,.1f}", hint
        )


def small_file(path: Path, most: int = 16 * MIB) -> bytes:
    """Return the contents of a file that should be small.

    Raises ValueError for one of more than ``most`` bytes, after reading no more than that, and OSError.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most / MIB:,.0f} MiB, too large for such a file")
    return content


def available_cores() -> int:
    """Return the number of cores that this process may use (respects affinity and SLURM's cgroups)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slurm_job() -> str | None:
    """Return the SLURM job that this process belongs to, as ``123_4`` or ``123``; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
