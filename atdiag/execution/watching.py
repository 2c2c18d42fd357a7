"""What a store's runs are doing, from their directories alone. Imports nothing heavy."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from atdiag.core.resources import small_file
from atdiag.core.runs import COHORT, DamagedRunError, Run, State, Store

_STALE = 60.0
"""Seconds without a sign of life after which that is said (a sign comes every ten seconds while steps are taken)."""


@dataclass(frozen=True)
class Group:
    """Runs that are trained side by side, as their process reported last."""

    runs: tuple[str, ...]
    host: str
    device: str
    job: str | None
    """The SLURM task."""
    doing: str
    done: int
    total: int
    """Steps of the runs together."""
    images_per_second: float | None
    seconds_left: float | None
    """Of training at this rate; None where that is not known."""
    age: float
    """Seconds since the report."""

    @property
    def silent(self) -> bool:
        """Whether the last report is old: a long test, a hanging disk, or a clock that differs."""
        return self.age > _STALE


@dataclass(frozen=True)
class StoreView:
    """The runs of a store by state, those trained now, and those that failed."""

    states: dict[State, int]
    groups: tuple[Group, ...]
    failures: tuple[tuple[str, str], ...]
    """Id and cause."""

    @property
    def seconds_left(self) -> float | None:
        """Time until the last of the groups has ended; None where one's is not known."""
        known = [group.seconds_left for group in self.groups]
        if not known or None in known:
            return None
        return max(seconds for seconds in known if seconds is not None)

    def record(self) -> dict[str, Any]:
        """Return it as a JSON record."""
        return {
            "at": round(time.time()),
            "states": self.states,
            "training": [asdict(group) | {"silent": group.silent} for group in self.groups],
            "seconds_left": self.seconds_left,
            "failures": [{"run": run, "cause": cause} for run, cause in self.failures],
        }


def look(store: Store) -> StoreView:
    """Look at all runs of a store. A finished run costs one request of the file system."""
    return view(store.every())


def view(runs: Iterable[Run]) -> StoreView:
    """Look at some runs."""
    states: Counter[State] = Counter()
    training, failures = [], []
    for run in runs:
        state = run.state
        if state == "new" and not (run.path / "spec.json").exists():  # removed, or no run
            continue
        states[state] += 1
        if state == "training":
            training.append(run)
        elif state == "failed":
            failures.append((run.id, _cause(run)))
    order: tuple[State, ...] = ("finished", "training", "interrupted", "failed", "new")
    return StoreView(
        {state: states[state] for state in order if states[state]}, groups(training), tuple(sorted(failures))
    )


def groups(training: Iterable[Run]) -> tuple[Group, ...]:
    """Return the groups of runs that are trained now; a run that no report names is a group by itself."""
    training = list(training)
    reports = [report for run in training if (report := _report(run)) is not None]
    reports.sort(key=lambda report: -report["at"])  # after a kill, an older one may name a run that is elsewhere now
    seen: set[str] = set()
    found = []
    for report in reports:
        runs = {name: steps for name, steps in report["runs"].items() if name not in seen}
        if runs:
            seen |= set(runs)
            found.append(_group(report, runs))
    found += [
        Group((run.id,), "", "", None, "starting", 0, 0, None, None, 0.0) for run in training if run.id not in seen
    ]
    return tuple(sorted(found, key=lambda group: (group.host, group.job or "", group.runs)))


def steps(run: Run) -> int:
    """Return the steps that an unfinished run has surely done, from its epochs; 0 if that can't be read."""
    try:
        return max((int(line["step"]) for line in run.progress()), default=0)
    except (DamagedRunError, KeyError, TypeError, ValueError, OSError):
        return 0


def _group(report: dict[str, Any], runs: dict[str, list[int]]) -> Group:
    rate, age = report["images_per_second"], max(0.0, time.time() - report["at"])
    return Group(
        tuple(sorted(runs)),
        report["host"],
        report["device"],
        report["job"],
        report["doing"],
        sum(done for done, _ in runs.values()),
        sum(total for _, total in runs.values()),
        rate,
        max(0.0, report["images_left"] / rate - age) if rate else None,
        round(age, 1),
    )


def _report(run: Run) -> dict[str, Any] | None:
    """Return what a cohort reported last in this run's directory; None if nothing that can be read."""
    try:
        report = json.loads(small_file(run.path / COHORT))
        _group(report, dict(report["runs"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(report)


def _cause(run: Run) -> str:
    try:
        return str((run.failure() or {}).get("cause", ""))
    except (DamagedRunError, OSError) as fault:
        return str(fault)
