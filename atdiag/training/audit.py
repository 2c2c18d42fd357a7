"""Verify runs: hash every file again, checkpoints included, and check that the files agree with each other.

Imports no torch, and trains, repairs and deletes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from atdiag.core.errors import UserError
from atdiag.core.runs import FILES, DamagedRunError, Run, broken_archive, file_sha256
from atdiag.core.spec import Teacher
from atdiag.networks.registry import specimens, teachers
from atdiag.networks.weights import sources
from atdiag.training import predictions

_AT_ONCE = 4
"""Runs hashed at the same time; more would only make a disk seek."""

State = Literal["sound", "damaged", "not verifiable", "unfinished"]


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one run.

    faults: each file with its fault. remedy: what to do about them. teacher_here: False if the weights of the run's
    teacher are not on this machine and so were not verified; None if the run has no teacher.
    """

    run: Run
    state: State
    faults: tuple[tuple[Path, str], ...] = ()
    remedy: str = ""
    teacher_here: bool | None = None

    def __str__(self) -> str:
        what = "; ".join(f"{path} ({why})" for path, why in self.faults)
        return f"{self.state} {self.run.id}: {what}: {self.remedy}"


def verify(runs: Sequence[Run], report: Callable[[int, int], None] = lambda done, total: None) -> list[Verdict]:
    """Verify every file of some runs. report: progress callback (done, total)."""
    weights = cache(_weights)  # hash a teacher shared by many runs once
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        out = []
        for verdict in pool.map(lambda run: _verify(run, weights), runs):
            out.append(verdict)
            report(len(out), len(runs))
    return out


def _verify(run: Run, weights: Callable[[Teacher], tuple[Path, str] | None]) -> Verdict:
    afresh = f"'atdiag runs remove {run.id}' starts that run afresh"
    try:
        spec = run.spec
        result = run.result() if run.finished else None
    except DamagedRunError as fault:
        return Verdict(run, "damaged", ((fault.path, fault.cause),), afresh)
    except OSError as fault:  # a failing disk, for example: go on with the other runs
        return Verdict(run, "damaged", ((run.path, fault.strerror or str(fault)),), "look at that disk first")
    if result is None:
        why = broken_archive(run.checkpoint) if run.checkpoint.exists() else None
        return Verdict(run, "unfinished") if why is None else Verdict(run, "damaged", ((run.checkpoint, why),), afresh)
    meant = result.get("files")
    faults = [] if meant is None else _files(run, meant)
    if run.predictions not in [path for path, _ in faults]:
        try:
            predictions.correct(run)
        except DamagedRunError as fault:
            faults.append((fault.path, fault.cause))
    remedy = afresh
    if not faults:  # derived files are checked only beside a sound run
        faults = _elsewhere(run)
        remedy = "delete it, and it is made again"
    here = None
    if spec.teacher is not None:
        found = weights(spec.teacher)
        here = found is not None
        if found is not None and found[1] != spec.teacher.sha256:
            why = f"it is not the file of {spec.teacher.label} that the run was made with"
            if not faults:
                remedy = f"put that one back (sha256 {str(spec.teacher.sha256)[:12]}, not {found[1][:12]})"
            faults.append((found[0], why))
    if faults:
        return Verdict(run, "damaged", tuple(faults), remedy, here)
    return Verdict(run, "sound" if meant is not None else "not verifiable", teacher_here=here)


def _files(run: Run, meant: object) -> list[tuple[Path, str]]:
    """List the files of a run that differ from what its result names."""
    if not isinstance(meant, dict):
        return [(run.path / "result.json", "its table of files is malformed")]
    faults = []
    for name in FILES:
        path = run.path / name
        try:
            now = file_sha256(path)
        except FileNotFoundError:
            faults.append((path, "it is missing"))
        except OSError as fault:
            faults.append((path, fault.strerror or str(fault)))
        else:
            if name not in meant:
                faults.append((run.path / "result.json", f"it has no sha256 of {name}"))
            elif now != meant[name]:
                faults.append((path, f"sha256 {now[:12]}, not {str(meant[name])[:12]}"))
    return faults


def _elsewhere(run: Run) -> list[tuple[Path, str]]:
    faults = []
    for path in sorted((run.path / "ood").glob("*.npz")):
        try:
            predictions.arrays(path)
        except ValueError as fault:
            faults.append((path, str(fault)))
    return faults


def _weights(teacher: Teacher) -> tuple[Path, str] | None:
    """Return the path of a teacher's weights on this machine, if present, and their current sha256."""
    try:
        if teachers.is_shipped(teacher):
            path: Path | None = specimens.shipped_file(teacher)
        else:
            path = sources.find(teachers.source(teacher.name))
        return None if path is None else (path, sources.fresh_sha256(path))
    except (UserError, OSError):  # a teacher known only on another machine, a deleted file
        return None
