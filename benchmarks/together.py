"""Start ten processes on one ablation at the same time, and check that they share the work.

    python benchmarks/together.py [--processes 10] [--json FILE]

Every process is the whole command line in one folder of runs. All have to end with exit code 0 and with the same table,
and each run has to be trained exactly once: from its first step, and with one result that was never written again (its
file is watched while the processes work). Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from atdiag.core.runs import Store
from atdiag.training import provenance

OPTIONS = ("layers", "--from", "top", "--k", "6", "--json")
SETS = ("recipe.epochs=2", "data.train=2048", "data.test_per_source=2")


def main() -> None:
    """Start, watch and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "atdiag.cli.app", *OPTIONS, *(word for item in SETS for word in ("--set", item))]
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        processes = [
            subprocess.Popen(
                [*command, "--runs", str(folder / "runs"), "--out", str(folder / f"out-{number}")],
                stdout=subprocess.PIPE,
                stderr=(folder / f"{number}.err").open("w"),
                text=True,
            )
            for number in range(options.processes)
        ]
        results: dict[str, set[Any]] = defaultdict(set)
        trainings: dict[str, set[Any]] = defaultdict(set)
        while any(process.poll() is None for process in processes):
            watch(folder / "runs", results, trainings)
            time.sleep(0.01)
        watch(folder / "runs", results, trainings)
        seconds = time.monotonic() - begin
        for number, process in enumerate(processes):
            if process.returncode:
                last = (folder / f"{number}.err").read_text().strip().splitlines()[-1:]
                faults.append(f"process {number} ended with {process.returncode}: {last}")
        tables = {numbers(process.communicate()[0]) for process in processes}
        if len(tables) != 1:
            faults.append(f"{len(tables)} different tables")
        runs = Store(folder / "runs").list()
        faults += [f"{run.id} is {run.state}" for run in runs if not run.finished]
        finished = [run for run in runs if run.finished]
        for run in finished:
            times = len(results[run.id]), len(trainings[run.id]) if run.spec.recipe.epochs else 1
            if times != (1, 1) or run.result()["origin"]["from_step"]:
                faults.append(f"{run.id}: {times[0]} results, {times[1]} trainings")
        # Each process has its own folder of results, which its command line names.
        shares = Counter(Path(run.result()["origin"]["command"][-1]).name for run in finished)
    print(
        f"{options.processes} processes, {len(finished)} runs in {seconds:.0f} s; by process: {sorted(shares.values())}"
    )
    print("each run trained exactly once, every process shows the same table" if not faults else "\n".join(faults))
    if options.json:
        found = {"processes": options.processes, "runs": len(finished), "by_process": dict(shares), "faults": faults}
        machine = provenance.environment(torch.device("cpu"))
        options.json.write_text(json.dumps({"machine": machine, "seconds": round(seconds), **found}, indent=1) + "\n")
    if faults:
        sys.exit(1)


def watch(folder: Path, results: dict[str, set[Any]], trainings: dict[str, set[Any]]) -> None:
    """Record every result seen (a second one would be another file), and every training.

    A training is recognised by its own event file.
    """
    for path in folder.glob("*/result.json"):
        status = path.stat()
        results[path.parent.name].add((status.st_ino, status.st_mtime_ns))
    for path in folder.glob("*/tensorboard/*"):
        trainings[path.parts[-3]].add(path.name)


def numbers(printed: str) -> str:
    """Return the document that a process printed, without the names of its files."""
    found = json.loads(printed.strip().splitlines()[-1])
    return json.dumps({name: value for name, value in found.items() if name != "files"}, sort_keys=True)


if __name__ == "__main__":
    main()
