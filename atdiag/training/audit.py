"""Whether runs are still what was written: every file hashed again, checkpoints too, what belongs together compared.

Needs no torch, and trains, mends and deletes nothing.
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
from atdiag.networks.registry import teachers
from atdiag.networks.weights import sources
from atdiag.training import predictions

_AT_ONCE = 4
"""Runs that are hashed at the same time: more only makes a disk seek."""

State = Literal["sound", "damaged", "not verifiable", "unfinished"]


@dataclass(frozen=True)
class Verdict:
    """What came of looking at one run.

    ``faults``: file and what is wrong with it. ``remedy``: what to do about them. ``teacher_here``: False where the
    weights of the run's teacher are not on this machine, so that nothing is said of them; None where it has none.
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
    """Look at every file of some runs. ``report`` is told how many of how many are done."""
    weights = cache(_weights)  # a teacher of many runs is hashed once
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
    except OSError as fault:  # of a disk that fails, say: what can be read of other runs is looked at all the same
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
    if not faults:  # what was made afterwards, beside a run that is sound
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
    """Which of a run's files are not those that its result names."""
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
    """The file of a teacher's weights on this machine, if it is here, and its sha256 as it is now."""
    try:
        if teachers.is_miniature(teacher):
            path: Path | None = sources.shipped_path(teacher.name)
        else:
            path = sources.find(teachers.source(teacher.name))
        return None if path is None else (path, sources.fresh_sha256(path))
    except (UserError, OSError):  # a teacher that only another machine knows, a file that is gone
        return None
