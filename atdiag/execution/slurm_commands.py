"""SLURM's own commands: what they are asked, and what they answer. No accounting is needed."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atdiag.core.errors import FaultError, UserError
from atdiag.execution import slurm_options

_FIELDS = "%i|%j|%T|%r|%N|%l"
ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
"""States of a task that SLURM won't run again."""
HOPELESS = frozenset(
    [
        "PartitionTimeLimit",
        "PartitionNodeLimit",
        "PartitionDown",
        "PartitionInactive",
        "BadConstraints",
        "InvalidAccount",
        "InvalidQOS",
        "JobHeldUser",
        "JobHeldAdmin",
        "DependencyNeverSatisfied",
        "AccountNotAllowed",
        "QOSNotAllowed",
    ]
) | {"launch failed requeued held", "job requeued in held state"}
"""Reasons for which a waiting task does not start unless someone does something."""
_CLUSTER = re.compile(
    r"contact|timed out|temporarily|communicat|connect|munge|credential|socket|zero bytes|slurmctld|configuration",
    re.I,
)
"""Words of refusals that are the cluster's fault, not the user's."""


@dataclass(frozen=True)
class Task:
    """A task of a job array, as the scheduler shows it."""

    job: str
    """The array's job id."""
    index: int
    name: str
    state: str
    reason: str
    node: str

    @property
    def ended(self) -> bool:
        """Whether SLURM won't run it again."""
        return self.state in ENDED

    @property
    def hopeless(self) -> bool:
        """Whether it waits for something that does not happen by itself."""
        return self.state in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT") and self.reason in HOPELESS

    def __str__(self) -> str:
        """Format it as SLURM's commands take it: ``123_4``."""
        return f"{self.job}_{self.index}"


def ask(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """Return what one of SLURM's commands prints.

    Raises UserError where there is no such command, or where SLURM refuses; FaultError where the cluster is at fault.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    except FileNotFoundError:
        raise UserError(
            f"there is no {words[0]} on this machine",
            "submit from a login node of the cluster, or leave out `executor`",
        ) from None
    except subprocess.TimeoutExpired:
        raise FaultError(f"{words[0]} did not answer for two minutes; the same command goes on from there") from None
    if done.returncode == 0:
        return done.stdout
    said = "; ".join(_without_prefix(line, words[0]) for line in done.stderr.splitlines() if line.strip())
    said = said or f"{words[0]} ended with exit code {done.returncode}"
    if _CLUSTER.search(said):
        raise FaultError(f"SLURM does not answer: {said}; the same command goes on from there")
    raise UserError(f"SLURM refuses: {said}")


def _without_prefix(line: str, command: str) -> str:
    return line.strip().removeprefix(f"{command}: ").removeprefix("error: ").rstrip(".")


def submit(options: Sequence[str], script: Path) -> str:
    """Submit a script; return the job's id. Raises as :func:`ask` does."""
    # Inside an allocation, its own settings would be taken over by what is submitted from it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    printed = ask("sbatch", "--parsable", *options, str(script), environment=environment)
    return printed.strip().splitlines()[-1].partition(";")[0]


def tasks() -> list[Task]:
    """Return this user's array tasks: those that wait or run, and those that ended minutes ago."""
    printed = ask(
        "squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", f"--format={_FIELDS}"
    )
    found = []
    for line in printed.splitlines():
        parts = line.split("|")
        job, sign, index = parts[0].partition("_")
        if len(parts) == 6 and sign and index.isdigit():
            found.append(Task(job, int(index), parts[1], parts[2], parts[3], parts[4]))
    return found


def longest(partition: str | None) -> float:
    """Return the longest time limit in seconds of the partitions, or of the default one. Raises as :func:`ask` does."""
    printed = ask("sinfo", "--noheader", "--format=%P|%l", *([f"--partition={partition}"] if partition else []))
    rows = [line.split("|") for line in printed.splitlines() if "|" in line]
    chosen = [length for name, length in rows if partition or name.strip().endswith("*")]
    known = [slurm_options.seconds(length.strip()) for length in chosen if re.match(r"[\d i]", length.strip())]
    return min(known, default=float("inf"))


def largest_array() -> int:
    """Return how many tasks an array may have. Raises as :func:`ask` does."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.M)
    return max(1, int(found[1]) - 1) if found else 1000


def partitions() -> list[str]:
    """Return the names of the partitions; empty where SLURM does not tell."""
    try:
        printed = ask("sinfo", "--noheader", "--format=%R")
    except (UserError, FaultError):
        return []
    return list(dict.fromkeys(printed.split()))


def requeue(job: str) -> None:
    """Put a job that runs in the queue again. Raises as :func:`ask` does."""
    ask("scontrol", "requeue", job)
