"""Which runs are still to do, in which cohorts, in which processes; and doing them.

On a CPU independent cohorts run in parallel processes of one thread each: at miniature size two such processes are far
faster than one process with two threads. The planner needs no torch, so the processes that train start at once.

The run directory is the only truth: a launcher never decides what is done. Workers are asked to train; what they
finished is read from disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import which
from statistics import median
from typing import Any

from atdiag.data import names
from atdiag.runs import DamagedRunError, Store
from atdiag.spec import Network, RunSpec
from atdiag.words import UserError, count, suggest

_FLOPS_PER_SECOND = 50e9
"""What one CPU thread does, until finished runs say better (measured on an idle server core of 2025)."""
_GPU_FLOPS_PER_SECOND = 50e12
"""A guess for a GPU (not measured), until finished runs say better."""

_BLOCK = 90e6
"""The least that a block costs in a step, as floating-point operations: its kernels have to be launched (fitted to
miniatures of width 32 and 48; nothing beside what a ViT-S costs)."""
_RELATIVE = {"copy": 0.65, "distill": 0.95}
"""What a method's step in all layers costs beside its operations: a student that copies has no q and k to learn, and
one forward pass of the teacher serves a cohort (measured on 250 runs of miniatures)."""

_STARTUP_SECONDS = 8.0


class FaultError(RuntimeError):
    """Something failed at run time; what is done is kept, and the next start goes on from there."""


class StoppedError(RuntimeError):
    """The user or the system asked to stop; every run under way wrote its checkpoint."""


@dataclass(frozen=True)
class Job:
    """What one process does: cohorts one after another."""

    cohorts: tuple[tuple[RunSpec, ...], ...]

    @property
    def specs(self) -> list[RunSpec]:
        """All runs of the job."""
        return [spec for cohort in self.cohorts for spec in cohort]


def macs(network: Network) -> float:
    """Multiply-accumulates of one image's forward pass (blocks, patch embedding and head)."""
    n, c = network.tokens, network.width
    block = n * c * c * (4 + 2 * network.mlp_ratio) + 2 * n * n * c
    return network.depth * block + network.grid**2 * network.patch_size**2 * network.channels * c + c * network.classes


def seconds(spec: RunSpec, flops_per_second: float = _FLOPS_PER_SECOND, tested: bool = True) -> float:
    """Estimated thread-seconds of a run: a step costs three forward passes of the student and one of the teacher."""
    steps = spec.recipe.epochs * (spec.data.train // spec.recipe.batch_size)
    step = spec.recipe.batch_size * (3 * 2 * macs(spec.network) + _of_teacher(spec)) + spec.network.depth * _BLOCK
    share = len(spec.transfer.layers or ()) / spec.network.depth
    relative = 1 - share * (1 - _RELATIVE.get(spec.transfer.method, 1.0))
    cost = steps * step * relative / flops_per_second
    return cost + (testing_seconds(spec, flops_per_second) if tested else 0)


def testing_seconds(spec: RunSpec, flops_per_second: float = _FLOPS_PER_SECOND) -> float:
    """Estimated thread-seconds of a run's test: a forward pass of the student, and of the teacher that it copies."""
    teacher = _of_teacher(spec) if spec.transfer.method == "copy" else 0
    return names.test_images(spec.data) * (2 * macs(spec.network) + teacher) / flops_per_second


def _of_teacher(spec: RunSpec) -> float:
    """Floating-point operations of the teacher's part of a forward pass."""
    if spec.teacher is None or not spec.transfer.layers:
        return 0.0
    return 2 * macs(spec.teacher.network) * (spec.transfer.layers[-1] + 1) / spec.teacher.network.depth


def measured_speed(store: Store, device: str, newest: int = 30) -> float:
    """FLOP/s of a training process on this device: the median of the newest finished runs, or a rule of thumb."""
    found = []
    for run in store.list()[-newest:]:
        # Whoever needs a run that is damaged, or of a version that recorded less, will hear of it.
        with contextlib.suppress(DamagedRunError, FileNotFoundError, KeyError, TypeError):
            spec, result = run.spec, run.result()
            if result["seconds"] > 1 and result["environment"]["device"].startswith(device):
                found.append(seconds(spec, 1.0, tested=False) / result["seconds"])
    usual = _FLOPS_PER_SECOND if device == "cpu" else _GPU_FLOPS_PER_SECOND
    return median(found) if len(found) > 2 else usual


def pending(specs: Sequence[RunSpec], store: Store) -> list[RunSpec]:
    """The runs that are not finished."""
    return [spec for spec in specs if not store.run(spec).finished]


def cohorts(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Group runs that can share a data stream and a teacher. A run without a teacher joins any of its stream."""
    groups: dict[tuple[str, str | None], list[RunSpec]] = {}
    for spec in sorted(specs, key=lambda s: s.teacher is None):  # those with a teacher found the groups
        if spec.teacher is not None:
            key = (spec.stream, spec.teacher.sha256)
        else:
            key = next((k for k in groups if k[0] == spec.stream), (spec.stream, ""))
        groups.setdefault(key, []).append(spec)
    return list(groups.values())


def plan(specs: Sequence[RunSpec], processes: int) -> list[Job]:
    """Share runs out over processes so that all end at about the same time, splitting as few cohorts as possible.

    Cohorts are laid end to end by estimated cost and cut into equal parts; a run goes to the part its middle lies in.
    """
    laid = [(spec, index) for index, cohort in enumerate(cohorts(specs)) for spec in cohort]
    total = sum(seconds(spec) for spec, _ in laid)
    bins: list[dict[int, list[RunSpec]]] = [{} for _ in range(max(1, min(processes, len(laid))))]
    position = 0.0
    for spec, index in laid:
        cost = seconds(spec)
        place = min(int((position + cost / 2) / total * len(bins)) if total else 0, len(bins) - 1)
        bins[place].setdefault(index, []).append(spec)
        position += cost
    return [Job(tuple(tuple(cohort) for cohort in part.values())) for part in bins if part]


def available_cores() -> int:
    """Cores that this process may use (affinity and SLURM's cgroups respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def estimate(specs: Sequence[RunSpec], processes: int, flops_per_second: float = _FLOPS_PER_SECOND) -> float:
    """Estimated wall seconds to do these runs."""
    if not specs:
        return 0.0
    longest = max(sum(seconds(spec, flops_per_second) for spec in job.specs) for job in plan(specs, processes))
    return longest + _STARTUP_SECONDS


@dataclass(frozen=True)
class Tick:
    """Progress over all processes."""

    done: int
    total: int
    images: int
    doing: str


def choose_device(wanted: str | None) -> str:
    """The device to train on: the wanted one, or the best that seems to be here: cuda, mps, cpu.

    Asked of the system and not of torch, which takes seconds to import. Raises UserError for one that is not here.
    """
    nvidia = Path("/proc/driver/nvidia/gpus")
    here = {
        "cuda": ((nvidia.is_dir() and any(nvidia.iterdir())) or (sys.platform == "win32" and bool(which("nvidia-smi"))))
        and os.environ.get("CUDA_VISIBLE_DEVICES") != "",
        "mps": sys.platform == "darwin" and os.uname().machine == "arm64",
        "cpu": True,
    }
    if wanted is None:
        return next(name for name, found in here.items() if found)
    if wanted not in here:
        raise UserError(f"unknown device {wanted!r}{suggest(wanted, here)} (known: {', '.join(here)})")
    if not here[wanted]:
        best = choose_device(None)
        raise UserError(f"there is no {wanted} device on this machine", f"leave --device out to use {best}")
    return wanted


def processes_for(device: str, threads: int | None) -> int:
    """How many training processes a device gets: one, or on a CPU as many as its cores have room for."""
    if device != "cpu":
        return 1
    return max(1, available_cores() // (threads or available_cores()))


def execute(
    specs: Sequence[RunSpec],
    store: Store,
    device: str,
    threads: int | None,
    tick: Callable[[Tick], None] = lambda t: None,
    micro_batch: int | None = None,
    deterministic: bool = False,
) -> None:
    """Bring every run to its end. Finished ones cost nothing; one that another process is training is waited for.

    ``micro_batch``, ``deterministic``: see :func:`atdiag.training.cohort.train`.

    Raises FaultError (what is done is kept) or StoppedError.
    """
    while todo := pending(specs, store):
        store.root.mkdir(parents=True, exist_ok=True)
        elsewhere = [spec for spec in todo if store.run(spec).state == "training"]
        if len(elsewhere) == len(todo):
            tick(Tick(0, 0, 0, f"waiting for {count(len(todo), 'run')} that another process is training"))
            time.sleep(1)
            continue
        ours = [spec for spec in todo if spec not in elsewhere]
        jobs = plan(ours, processes_for(device, threads))
        statuses = _Crew(jobs, store, device, threads, tick, micro_batch, deterministic).work()
        if failed := [spec for spec in ours if statuses.get(spec.id) == "failed"]:
            raise FaultError(_failures(failed, store))
        if "busy" not in statuses.values() and pending(ours, store):
            raise FaultError("a training process ended before its runs did; start again to go on")


def _failures(failed: Sequence[RunSpec], store: Store) -> str:
    facts = [(spec.id, store.run(spec).failure() or {}) for spec in failed]
    text = "; ".join(f"run {name} stopped at step {fact.get('step')}: {fact.get('cause')}" for name, fact in facts)
    hint = "; a smaller recipe.lr may help" if any(fact.get("step") for _, fact in facts) else ""
    return f"{text} (the other runs are kept{hint})"


class _Crew:
    """The worker processes of one round."""

    def __init__(
        self,
        jobs: list[Job],
        store: Store,
        device: str,
        threads: int | None,
        tick: Callable[[Tick], None],
        micro_batch: int | None,
        deterministic: bool,
    ) -> None:
        self.jobs, self.store, self.tick = jobs, store, tick
        self.orders = [
            {
                "runs": str(store.root.resolve()),
                "threads": threads,
                "device": device,
                "processes": len(jobs),
                "command": sys.argv,
                "micro_batch": micro_batch,
                "deterministic": deterministic,
                "cohorts": [[spec.model_dump(mode="json") for spec in cohort] for cohort in job.cohorts],
            }
            for job in jobs
        ]
        self.messages: SimpleQueue[tuple[int, dict[str, Any] | None]] = SimpleQueue()
        self.errors: list[list[str]] = [[] for _ in jobs]

    def work(self) -> dict[str, str]:
        """Run all jobs to their end and return each run's status by id."""
        workers = [self._start(index, order) for index, order in enumerate(self.orders)]
        try:
            return self._listen(workers)
        except BaseException:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()  # a worker that is asked to end writes its checkpoints first
            for worker in workers:
                try:
                    worker.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    worker.kill()
            raise

    def _start(self, index: int, order: dict[str, Any]) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "atdiag.study.worker"],  # -P: what lies in the working folder is not imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the workers through us, once
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()  # left open: its end tells the worker that we are gone

        def complain() -> None:
            assert worker.stderr is not None
            for line in worker.stderr:
                self.errors[index] = [*self.errors[index][-30:], line.rstrip()]

        complaints = threading.Thread(target=complain, daemon=True)
        complaints.start()

        def listen() -> None:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    with contextlib.suppress(json.JSONDecodeError):  # what a library printed in passing
                        self.messages.put((index, json.loads(line)))
            finally:
                complaints.join()  # its last words are read before its end is told
                self.messages.put((index, None))

        threading.Thread(target=listen, daemon=True).start()
        return worker

    def _listen(self, workers: list[subprocess.Popen[str]]) -> dict[str, str]:
        statuses: dict[str, str] = {}
        latest: dict[int, dict[str, Any]] = {}
        open_ = set(range(len(workers)))
        while open_:
            try:
                index, message = self.messages.get(timeout=0.5)
            except Empty:
                continue
            if message is None:
                open_.discard(index)
                self._ended(index, workers[index].wait())
            elif "status" in message:
                statuses |= message["status"]
            else:
                latest[index] = message
            self.tick(
                Tick(
                    done=sum(m["done"] for m in latest.values()),
                    total=sum(m["total"] for m in latest.values()),
                    images=sum(m["images"] for m in latest.values()),
                    doing=message.get("doing", "") if message else "",
                )
            )
        return statuses

    def _ended(self, index: int, code: int) -> None:
        if code == 143:
            raise StoppedError("a training process was asked to stop")
        if code:
            words = [line for line in self.errors[index] if line.strip()]
            if code < 0:
                last = f"it was ended by {signal.Signals(-code).name}"
                last += " (out of memory?)" if code == -signal.SIGKILL else ""
            else:
                # The exception's first line: what it goes on to say is indented, as is the traceback.
                last = next((line for line in reversed(words) if not line[0].isspace()), f"exit code {code}")
                last = re.sub(r"^atdiag\.[\w.]+Error: ", "", last)  # our own errors say all in their message
            log = self.store.root / "last-fault.log"
            try:
                log.write_text("\n".join([*words, last]) + "\n")
                where = f" (its last words are in {log})"
            except OSError:  # the fault may be that nothing can be written there
                where = ""
            raise FaultError(f"a training process failed: {last}{where}; the same command goes on from there")
