"""Execute jobs on a cluster with SLURM: a job array of orders, submitted with plain ``sbatch``.

What is submitted is a command line and a JSON order for each task. SLURM says which tasks wait and run; what is
finished is read from run directories alone, so that a cluster without accounting is enough.

    <runs>/slurm/<time>-<digits>/order-N.json   the cohorts of task N
                                 runs.json      the ids of its runs, for each task
                                 job.sh         what every task runs
                                 task-N.log     what it says
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from atdiag.core.errors import FaultError, UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.progress import Progress
from atdiag.core.runs import Run, Store
from atdiag.core.text import count
from atdiag.execution import cost, devices, last_words, plan, slurm_commands, source, turns, watching
from atdiag.execution import slurm_options as asking
from atdiag.execution.executor import Update
from atdiag.execution.order import Order
from atdiag.execution.plan import Job
from atdiag.execution.slurm_commands import Task
from atdiag.execution.slurm_options import SlurmOptions

_NAME = "atdiag-"
"""Prefix of jobs' names; the name of the submission's folder follows."""
_PATIENCE = 900.0
"""Seconds for which a scheduler that does not answer is asked again while jobs are followed."""
_LATE = 90.0
"""Seconds after a task's end in which a network file system may still show an older state of its runs."""
_MARGIN, _LEAST = 1.5, 900.0
"""The time limit is the estimate times this, and at least this many seconds more."""


@dataclass(frozen=True)
class Submission:
    """A job array that was submitted."""

    job: str
    folder: Path
    tasks: int
    runs: int
    limit: str
    at_once: int


@dataclass(frozen=True)
class Queued:
    """A task that waits or runs, or has ended in the last minutes, and its runs."""

    task: Task
    runs: frozenset[str]
    log: Path


class SlurmExecutor:
    """Job arrays on a SLURM cluster. If this process ends, they go on."""

    def __init__(self, options: SlurmOptions | None = None, flops_per_second: float | None = None) -> None:
        """flops_per_second: speed of a task, for its time limit; None: as finished runs have it."""
        self.options = options or SlurmOptions()
        self.speed = flops_per_second
        self.submitted: list[Submission] = []
        """The arrays of the last submission."""
        self._followed: dict[str, Run] = {}
        self._steps: dict[str, int] = {}
        self._last: dict[str, Queued] = {}
        self._root = Path()
        self._next = self._answered = 0.0
        self._over_since: float | None = None
        self._latest = Progress(0, 0)

    def processes(self, options: ExecutionOptions) -> int:
        """Return how many tasks may run at once; 1 where nothing says, so that no cohort is divided.

        Raises UserError for options that have no meaning on a cluster.
        """
        if options.per_device is not None:
            raise UserError("`per_device` is for the devices of one machine", "leave it out: a task has its own device")
        return devices.number(options.devices) or 1

    def submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        """Submit the cohorts whose runs are not queued already, and follow all of them."""
        self.processes(options)
        specs = [spec for job in jobs for spec in job.specs]
        self._root = Path(os.path.abspath(store.root)) / "slurm"  # noqa: PTH100 - links stay: a node may know only those
        self._root.mkdir(parents=True, exist_ok=True)
        self._followed = {spec.id: store.run(spec) for spec in specs}
        self._steps = {spec.id: turns.steps([spec]) for spec in specs}
        self._last, self.submitted, self._over_since = {}, [], None
        self._next, self._answered = 0.0, time.monotonic()
        with FileLock(self._root / "lock"):  # of ten commands at once, the first submits what the others then find
            queued = {run for one in queue(self._root) if not one.task.ended for run in one.runs}
            cohorts = [
                tuple(spec for spec in cohort if spec.id not in queued and not store.run(spec).finished)
                for job in plan.single(jobs)
                for cohort in job.cohorts
            ]
            if new := [cohort for cohort in cohorts if cohort]:
                self._submit([Job((cohort,)) for cohort in new], store, options)

    def poll(self) -> Update | None:
        """Wait a moment; from time to time, ask the scheduler and look at the runs."""
        if not self._followed:
            return None
        if (wait := self._next - time.monotonic()) > 0:
            time.sleep(min(0.5, wait))
            return Update(self._latest)
        self._next = time.monotonic() + self.options.poll
        try:
            found = [one for one in queue(self._root) if one.runs & set(self._followed)]
            self._answered = time.monotonic()
        except FaultError:
            if time.monotonic() - self._answered > _PATIENCE:
                raise
            return Update(self._latest)
        live = {str(one.task): one for one in found if not one.task.ended}
        self._last |= {str(one.task): one for one in found}
        unfinished = {name: run for name, run in self._followed.items() if not run.finished}
        statuses = {name: "finished" for name in self._followed if name not in unfinished}
        self._latest = self._progress(unfinished, list(live.values()))
        if unfinished and live:
            self._check_hopeless(list(live.values()))
            self._over_since = None
            return Update(self._latest, statuses)
        if unfinished and not self._ended(unfinished, statuses):
            return Update(self._latest)
        self._followed = {}
        return Update(self._latest, statuses)

    def cancel(self) -> None:
        """Follow no longer. The jobs go on: ``scancel`` ends them."""
        self._followed = {}

    # --- submission ------------------------------------------------------------------------------------------------

    def _submit(self, jobs: Sequence[Job], store: Store, options: ExecutionOptions) -> None:
        device = on_node(options)
        most = slurm_commands.largest_array()
        parts = [jobs[start : start + most] for start in range(0, len(jobs), most)]
        at_once = self.options.throttle or devices.number(options.devices) or len(jobs)
        speed = self.speed or cost.measured_speed(store, device)
        for part in parts:
            needed = max(sum(cost.seconds(spec, speed) for spec in job.specs) for job in part)
            limit = self.options.time or self._limit(needed)
            self.submitted.append(
                self._array(part, replace(options, device=device), limit, max(1, at_once // len(parts)))
            )

    def _limit(self, needed: float) -> str:
        """Return a time limit for an estimate: with room, but not longer than the partition allows."""
        return asking.limit(min(needed * _MARGIN + _LEAST, slurm_commands.longest(self.options.partition)))

    def _array(self, jobs: Sequence[Job], options: ExecutionOptions, limit: str, at_once: int) -> Submission:
        """Write the orders of one job array and submit it; if that fails, nothing of it is left."""
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = self._root / name
        folder.mkdir()
        try:
            on = replace(options, devices=None)
            for index, job in enumerate(jobs):
                order = Order(self._root.parent, on, 1, tuple(sys.argv), job.cohorts, source.digest())
                (folder / f"order-{index}.json").write_text(order.to_json())
            ids = [[spec.id for spec in job.specs] for job in jobs]
            (folder / "runs.json").write_text(json.dumps(ids))
            (folder / "job.sh").write_text(self._script(folder, limit))
            at_once = min(at_once, len(jobs))
            job_id = slurm_commands.submit(self._flags(name, folder, len(jobs), limit, at_once, on), folder / "job.sh")
        except BaseException as fault:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(fault, UserError) and "partition" in str(fault):
                known = slurm_commands.partitions()
                raise UserError(str(fault), f"`slurm.partition` may be {', '.join(known)}") from None
            raise
        return Submission(job_id, folder, len(jobs), sum(map(len, ids)), limit, at_once)

    def _flags(
        self, name: str, folder: Path, tasks: int, limit: str, at_once: int, options: ExecutionOptions
    ) -> list[str]:
        on_gpu = options.device == "cuda"
        cpus = self.options.cpus or (8 if on_gpu else options.threads or 1)
        own = [flag for flag in self.options.flags() if not flag.startswith("--time=")]
        gres = ["--gres=gpu:1"] if on_gpu and self.options.gres is None else []
        return [
            f"--job-name={_NAME}{name}",
            f"--array=0-{tasks - 1}%{at_once}",
            f"--time={limit}",
            "--nodes=1",
            "--ntasks=1",
            f"--cpus-per-task={cpus}",
            f"--output={folder}/task-%a.log",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:USR1@{self._notice(limit)}",
            *gres,
            *own,
        ]

    def _notice(self, limit: str) -> int:
        """Return how many seconds before the time limit a task is told: at most a quarter of the limit."""
        return int(min(self.options.notice, asking.seconds(limit) / 4))

    def _script(self, folder: Path, limit: str) -> str:
        """Return what every task runs. Signals reach the training process, which takes the shell's place."""
        python = shlex.quote(self.options.python or sys.executable)
        order = f"{shlex.quote(str(folder))}/order-$SLURM_ARRAY_TASK_ID.json"
        before = f"{self.options.container} " if self.options.container else ""
        run = f"{before}{python} -P -m atdiag.execution.worker --notice {self._notice(limit)} {order}"
        told = 'echo "atdiag: task $SLURM_ARRAY_TASK_ID on $(hostname), start ${SLURM_RESTART_COUNT:-0}"'
        return "\n".join(["#!/bin/bash", "trap '' USR1", told, *self.options.setup, f"exec {run}", ""])

    # --- following -------------------------------------------------------------------------------------------------

    def _progress(self, unfinished: dict[str, Run], live: Sequence[Queued]) -> Progress:
        """Return the steps done over all followed runs, and what the tasks do."""
        groups = watching.groups(run for run in unfinished.values() if run.state == "training")
        reported = {name for group in groups for name in group.runs if group.total}
        done = sum(steps for name, steps in self._steps.items() if name not in unfinished)
        done += sum(group.done for group in groups)
        done += sum(watching.steps(run) for name, run in unfinished.items() if name not in reported)
        return Progress(done, sum(self._steps.values()), 0, told([one.task for one in live]))

    def _check_hopeless(self, live: Sequence[Queued]) -> None:
        """Raise FaultError if nothing is left but tasks that won't start by themselves."""
        if all(one.task.hopeless for one in live):
            task = live[0].task
            raise FaultError(
                f"SLURM job {task.job} waits and does not start by itself ({task.reason}): "
                f"'scancel {task.job}' removes it. "
                "Ask for what the cluster has, with `slurm.partition`, `slurm.time` and such"
            )

    def _ended(self, unfinished: dict[str, Run], statuses: dict[str, str]) -> bool:
        """Say why runs are unfinished though no task is left; False if the file system may not show all of it yet.

        Failed runs get their status. Raises FaultError for runs that stopped otherwise.
        """
        self._over_since = self._over_since or time.monotonic()
        lost = {}
        for name, run in unfinished.items():
            if run.state in ("failed", "training"):
                statuses[name] = "failed" if run.state == "failed" else "busy"
            else:
                lost[name] = run
        if not lost:
            return True
        tasks = [one for one in self._last.values() if one.runs & set(lost)]
        bad = [one for one in tasks if one.task.state != "COMPLETED"]
        if not bad and time.monotonic() - self._over_since < _LATE:
            return False
        self._followed = {}
        what = why(bad[0]) if bad else "its SLURM task ended before it did"
        more = f"; {len(bad) - 1} more tasks ended so" if len(bad) > 1 else ""
        raise FaultError(f"{count(len(lost), 'run')} unfinished: {what}{more}; the same command goes on from there")


def on_node(options: ExecutionOptions) -> str:
    """Return the device to train on at a node: this machine, a login node, need not have it."""
    return devices.named(options.device) or "cuda"


def queue(root: Path) -> list[Queued]:
    """Return this user's tasks of a store's submissions, as SLURM shows them.

    root: the folder of submissions. Raises as :func:`slurm_commands.ask` does.
    """
    runs: dict[str, list[list[str]]] = {}
    found = []
    for task in slurm_commands.tasks():
        folder = root / task.name.removeprefix(_NAME)
        if not task.name.startswith(_NAME) or not (folder / "runs.json").is_file():
            continue
        if task.name not in runs:
            runs[task.name] = json.loads((folder / "runs.json").read_text())
        if task.index < len(runs[task.name]):
            found.append(Queued(task, frozenset(runs[task.name][task.index]), folder / f"task-{task.index}.log"))
    return found


def told(tasks: Sequence[Task]) -> str:
    """Format what tasks do: ``2 running, 3 waiting (Resources)``."""
    waiting = [task for task in tasks if task.state != "RUNNING"]
    reasons = dict.fromkeys(task.reason for task in waiting if task.reason not in ("None", ""))
    parts = [f"{len(tasks) - len(waiting)} running"] if len(waiting) < len(tasks) else []
    parts += [f"{len(waiting)} waiting" + (f" ({', '.join(list(reasons)[:2])})" if reasons else "")] if waiting else []
    return ", ".join(parts)


def why(one: Queued) -> str:
    """Say in one line why a task ended without finishing its runs."""
    task, state = one.task, one.task.state
    on = f" on {task.node}" if task.node else ""
    if state.startswith("CANCELLED"):
        return f"SLURM task {task} was cancelled"
    if state == "NODE_FAIL":
        return f"the node of SLURM task {task}{on} failed"
    if state == "TIMEOUT":
        return f"SLURM task {task}{on} reached its time limit before it could be put in the queue again"
    try:
        lines = one.log.read_text(errors="replace").splitlines()
    except OSError:
        return f"SLURM task {task}{on} ended ({state}) and wrote no log: does the node see {one.log.parent}?"
    if state == "OUT_OF_MEMORY":
        return f"SLURM task {task}{on} ran out of memory: give more with `slurm.memory` ({one.log})"
    return f"SLURM task {task}{on} ended ({state}): {last_words.cause(lines) or 'it said nothing'} ({one.log})"
