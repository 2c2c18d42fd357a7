"""Kill training at random moments, resume it, and compare with training that was never interrupted.

    python benchmarks/kills.py [--kills 200] [--commands 40] [--lanes 2] [--seed 0] [--json FILE]

Each of ``--kills`` trains a small cohort of the miniature (scratch, copy, distill; with Mixup, CutMix, drop path and an
average of the weights) in a process of its own that writes checkpoints as often as it may, kills that process with
SIGKILL, and lets another finish. Every second moment is counted from the first checkpoint, and every fourth kill waits
until a file is half-written. Each of ``--commands`` does the same to the whole command line, as a user types it, and
kills, in turn, all of its processes, the command alone, or one process that trains.

A kill counts as survived if afterwards every existing file is whole, runs with a checkpoint resume from its step, and
weights and predictions are, byte for byte, those of the uninterrupted runs. Exit code 1 unless all are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ablations.benchmark import benchmark
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Run, Store
from atdiag.core.spec import RunSpec
from atdiag.execution import plan
from atdiag.networks.weights import loading
from atdiag.study.builder import Lab
from atdiag.study.protocol import Study
from atdiag.study.settings import resolve
from atdiag.training import checkpoint, cohort, provenance

SETS = (
    "recipe.epochs=2",
    "data.train=512",
    "recipe.batch_size=32",
    "data.test_per_source=1",
    "recipe.mixup=0.8",
    "recipe.cutmix=1.0",
    "recipe.drop_path=0.1",
    "recipe.ema=0.9",
)
OPTIONS = ("benchmark", "--teacher", "deit_s", "--methods", "copy,distill", "--seeds", "1", "--json")
COMMAND = (sys.executable, "-m", "atdiag.cli.app", *OPTIONS, *(word for item in SETS for word in ("--set", item)))
WHOM = ("all", "the command", "one that trains")


def specs() -> list[RunSpec]:
    """Return the runs that the command line above trains."""
    lab = Lab(resolve(sets=SETS, seeds=1, environment={}, folder=Path("/nonexistent")))
    study = benchmark(lab, "deit_s", "copy,distill")
    assert isinstance(study, Study)
    return study.specs


def train(folder: Path) -> None:
    """Train the runs in this process."""
    torch.set_num_threads(1)
    for group in plan.cohorts(specs()):
        cohort.train(group, Store(folder), loading.load, ExecutionOptions(device="cpu", checkpoint_seconds=0.0))


def forked(work: Callable[[], None]) -> int:
    """Fork a process that runs ``work`` at once, with everything already imported."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return child


def kill_training(folder: Path, moment: float, begun: bool, half_written: bool) -> bool:
    """Train, and kill the process after ``moment`` seconds; return whether it was killed before it ended.

    begun: count from its first checkpoint. half_written: wait until a file is half-written.
    """
    child = forked(partial(train, folder))

    def until(pattern: str) -> None:
        while not any(folder.glob(pattern)) and os.waitid(os.P_PID, child, _ENDED | os.WNOHANG) is None:
            time.sleep(0.0002)

    if begun:
        until("*/checkpoint")
    time.sleep(moment)
    if half_written:
        until("*/.*-*")
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


_ENDED = os.WEXITED | os.WNOWAIT


def finish_training(folder: Path) -> str:
    """Train to the end; return the fault, if any."""
    code = os.waitstatus_to_exitcode(os.waitpid(forked(partial(train, folder)), 0)[1])
    return f"the second start ended with {code}" if code else ""


def kill_command(folder: Path, moment: float, whom: str) -> bool:
    """Start the command line, and kill some of its processes; return whether any was killed before it ended."""
    main = _start(folder)
    with suppress(subprocess.TimeoutExpired):
        main.communicate(timeout=moment)
        return False
    family = {"all": [*_children(main.pid), main.pid], "the command": [main.pid], "one that trains": []}[whom]
    if whom == "one that trains":
        family = _children(main.pid)[:1]
    killed = 0
    for process in family:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            killed += 1
    main.communicate(timeout=120)
    deadline = time.monotonic() + 120
    while any(run.state == "training" for run in Store(folder).list()) and time.monotonic() < deadline:
        time.sleep(0.05)  # give training processes time to write their checkpoints
    return killed > 0 and main.returncode != 0


def finish_command(folder: Path) -> str:
    """Repeat the same command; return the fault, if any."""
    main = _start(folder)
    _, errors = main.communicate(timeout=600)
    return "" if main.returncode == 0 else f"the second start ended with {main.returncode}: {errors.strip()[-300:]}"


def _start(folder: Path) -> subprocess.Popen[str]:
    where = ("--runs", str(folder), "--out", str(folder.with_name(f"{folder.name}-out")))
    return subprocess.Popen([*COMMAND, *where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in found]


def of_training(index: int, moment: float) -> Callable[[Path], bool]:
    """Perform kill number ``index`` on a training process."""
    begun = index % 2 == 1  # preparation takes as long as training
    return partial(kill_training, moment=moment / 2 if begun else moment, begun=begun, half_written=index % 4 == 3)


def of_command(index: int, moment: float) -> Callable[[Path], bool]:
    """Perform kill number ``index`` on the command line."""
    return partial(kill_command, moment=moment, whom=WHOM[index % 3])


def whole(run: Run) -> Iterator[str]:
    """Yield the faults of a killed run: half-written files, or an incomplete run that counts as finished."""
    if not (run.path / "spec.json").exists():
        return  # killed between creating the folder and writing the spec: it is empty
    _ = run.spec
    if run.finished:
        for name in run.result()["files"]:
            run.sound(run.path / name)
        if not run.result()["files"].keys() >= {"spec.json", "weights.safetensors", "predictions.npz"}:
            yield f"{run.id} passes for finished without all of its files"
    elif run.checkpoint.exists():
        checkpoint.load(run)


def steps(folder: Path) -> dict[str, int]:
    """Return the step that each unfinished run with a checkpoint has reached."""
    found = [run for run in Store(folder).list() if not run.finished and run.checkpoint.exists()]
    return {run.id: saved.step for run in found if (saved := checkpoint.load(run)) is not None}


def same(folder: Path, meant: Path, reached: dict[str, int]) -> Iterator[str]:
    """Yield the differences from the uninterrupted runs."""
    for spec in specs():
        run, other = Store(folder).run(spec), Store(meant).run(spec)
        if not run.finished:
            yield f"{run.id} is lost: {run.state}"
            continue
        for name in ("weights.safetensors", "predictions.npz"):
            if (run.path / name).read_bytes() != (other.path / name).read_bytes():
                yield f"{run.id}/{name} differs"
        began = run.result()["origin"]["from_step"]
        if run.id in reached and began != reached[run.id]:
            yield f"{run.id} went on from step {began}, not {reached[run.id]}"
        if left := [path.name for path in run.path.glob(".*-*")]:
            yield f"{run.id} keeps {left}"


def survive(kill: Callable[[Path], bool], finish: Callable[[Path], str], folder: Path, meant: Path) -> dict[str, Any]:
    """Perform one kill and return what was found."""
    shutil.rmtree(folder, ignore_errors=True)
    killed = kill(folder)
    faults: list[str] = []
    try:
        runs = Store(folder).list()
        faults += [fault for run in runs for fault in whole(run)]
        reached = steps(folder)
        finished = sum(run.finished for run in runs)
        half = sum(1 for _ in folder.glob("*/.*-*"))
        faults += filter(None, [finish(folder)])
        faults += same(folder, meant, reached)
    except Exception as fault:  # a damaged file: exactly what this test looks for
        return {"killed": killed, "faults": [*faults, f"{type(fault).__name__}: {fault}"], "state": "damaged"}
    state = "finished runs" if finished else "checkpoints" if reached else "no checkpoint yet"
    shutil.rmtree(folder, ignore_errors=True)
    return {"killed": killed, "faults": faults, "state": state, "half_written": half}


def trial(
    kill_of: Callable[[int, float], Callable[[Path], bool]],
    finish: Callable[[Path], str],
    duration: float,
    folder: Path,
    seed: int,
    index: int,
) -> dict[str, Any]:
    """Perform one kill at a random moment; one after the end is repeated with a moment from the first half."""
    draws = random.Random(f"{folder.name} {seed} {index}")
    while True:
        moment = draws.uniform(0, duration)
        out = survive(
            kill_of(index, moment), finish, folder.with_name(f"{folder.name}-{index}"), folder.with_name("meant")
        )
        if out["killed"] or out["faults"]:
            return {"index": index, "moment": round(moment, 3), **out}
        duration /= 2  # measured while the machine was busier


def trials(number: int, lanes: int, one: Callable[[int], dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Perform this many kills, ``lanes`` at once, each lane a process without threads (which forking would harm)."""
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(lanes, multiprocessing.get_context("fork")) as pool:
        for result in pool.map(one, range(number)):
            found.append(result)
            bad = sum(bool(one["faults"]) for one in found)
            print(
                f"\r{name}: {len(found)} of {number}, {len(found) - bad} survived", end="", file=sys.stderr, flush=True
            )
    print(file=sys.stderr)
    return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise some kills."""
    faults = [{key: one[key] for key in ("index", "moment", "faults")} for one in found if one["faults"]]
    return {
        "kills": len(found),
        "survived": len(found) - len(faults),
        "found_after_the_kill": dict(Counter(one["state"] for one in found)),
        "with_a_half_written_file": sum(bool(one.get("half_written")) for one in found),
        "faults": faults,
    }


def main() -> None:
    """Kill and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--commands", type=int, default=40)
    parser.add_argument("--lanes", type=int, default=2, help="How many at once.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    specs(), provenance.environment(torch.device("cpu"))  # trigger all lazy imports
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        if fault := finish_training(folder / "meant"):
            sys.exit(fault)
        alone = time.monotonic() - begin
        typed = 0.0
        if options.commands:
            begin = time.monotonic()
            if fault := finish_command(folder / "typed"):
                sys.exit(fault)
            typed = time.monotonic() - begin
            if faults := list(same(folder / "typed", folder / "meant", {})):
                sys.exit(f"the command line trains other runs than this script: {faults}")

        report = {}
        for name, number, kill_of, finish, duration in (
            ("training", options.kills, of_training, finish_training, alone),
            ("command line", options.commands, of_command, finish_command, typed),
        ):
            if number:
                one = partial(trial, kill_of, finish, duration, folder / name, options.seed)
                report[name] = summary(trials(number, options.lanes, one, name))
    for name, one in report.items():
        print(f"{name}: {one['survived']} of {one['kills']} kills survived; found: {one['found_after_the_kill']}, ")
        print(f"  {one['with_a_half_written_file']} times with a half-written file")
        for fault in one["faults"]:
            print(f"  {fault}")
    if options.json:
        about = {"machine": provenance.environment(torch.device("cpu")), "seed": options.seed, "sets": SETS}
        options.json.write_text(json.dumps({**about, "uninterrupted_s": round(alone, 2), **report}, indent=1) + "\n")
    if any(one["faults"] for one in report.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
