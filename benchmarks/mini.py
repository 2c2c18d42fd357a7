"""Time the README's commands on this machine: whole processes, medians of several.

    python benchmarks/mini.py [--repeats 3] [--json FILE]

Each first run works in a fresh folder; the second finds everything finished.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REINIT = ["reinit", "--module", "attn", "--teacher", "clip_b"]


def seconds(arguments: list[str], folder: Path) -> float:
    """Return the wall-clock seconds of one command in a folder. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "atdiag.cli.app", *arguments]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def scenes(count: int = 10_000) -> float:
    """Return the seconds to generate ``count`` training scenes in this process, with source digits loaded."""
    from atdiag.data import scenes

    scenes.train_scenes("digits", 1, 0, 6)
    begin = time.perf_counter()
    scenes.train_scenes("digits", count, 0, 6)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {
        "help": [],
        "reinit, first time": [],
        "reinit, second time": [],
        "10,000 scenes": [],
    }
    for _ in range(options.repeats):
        times["10,000 scenes"].append(scenes())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            times["help"].append(seconds(["--help"], folder))
            times["reinit, first time"].append(seconds(REINIT, folder))
            times["reinit, second time"].append(seconds(REINIT, folder))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:>22}  {value:8.2f} s")
    if options.json:
        machine = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}
        measured = {name: [round(v, 3) for v in values] for name, values in times.items()}
        options.json.write_text(
            json.dumps({"machine": machine, "median_s": medians, "all_s": measured}, indent=1) + "\n"
        )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        return next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    return platform.processor()


if __name__ == "__main__":
    main()
