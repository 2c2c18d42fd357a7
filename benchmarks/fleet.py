"""Simulate many runs on many devices that fail: the production scheduler code with a simulated clock.

python benchmarks/fleet.py --json benchmarks/results/fleet.json

What is real: cohorts and their division (`atdiag.execution.plan`), estimates (`cost`), which job goes where
(`dispatch`), and the rule of checkpoints. What is simulated: the clock, the devices, and what befalls them. Each device
is lost with 1 % probability an hour (and is back after an hour), its job is preempted every 4 hours (with notice: a
checkpoint is written), and one in twenty is a straggler at half speed. Lost is what was done since the last checkpoint.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from atdiag.core.options import ExecutionOptions
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.execution import cost, gpus, plan
from atdiag.execution.dispatch import Dispatch

HOUR = 3600.0
LOSS, BACK = 0.01 / HOUR, HOUR
PREEMPTED, STRAGGLERS, SLOW = 4 * HOUR, 0.05, 0.5
START = 60.0
"""Seconds of a process before its first step."""
BEAT = 10.0
"""Seconds between two reports of a cohort (`atdiag.training.pulse`)."""


def runs(number: int) -> list[RunSpec]:
    """Return so many runs of a ViT-B: cohorts of four learning rates for each seed, of three lengths."""
    network = Network(image_size=224, patch_size=16, channels=3, width=768, depth=12, heads=12, classes=1000)
    out = []
    for index in range(number):
        seed, arm = divmod(index, 4)
        recipe = Recipe(epochs=(30, 60, 100)[seed % 3], batch_size=256, lr=1e-4 * (arm + 1), warmup_epochs=1)
        data = Data(name="digits", train=300_000)
        out.append(RunSpec(network=network, data=data, recipe=recipe, seed=Seed(data=seed, model=seed)))
    return out


@dataclass
class Outcome:
    """What a simulation counts."""

    makespan: float = 0.0
    lost: float = 0.0
    done: float = 0.0
    interruptions: int = 0
    trained: dict[int, int] = field(default_factory=dict)
    writes: float = 0.0


def simulate(jobs: list[float], members: list[int], devices: int, chance: random.Random) -> Outcome:
    """Train jobs of these seconds and numbers of runs on unreliable devices."""
    speed = [SLOW if chance.random() < STRAGGLERS else 1.0 for _ in range(devices)]
    queue, out, left = Dispatch(len(jobs), devices), Outcome(), list(jobs)
    interval = ExecutionOptions().checkpoint_seconds
    events: list[tuple[float, int, str, int, int, float, bool]] = []
    serial, now = 0, 0.0

    def start() -> None:
        nonlocal serial
        for job, place in queue.starts():
            needed = START + left[job] / speed[place]
            fails = now + chance.expovariate(LOSS)
            preempted = now + PREEMPTED
            end = min(now + needed, fails, preempted)
            how = "ended" if end == now + needed else "lost" if end == fails else "preempted"
            serial += 1
            heapq.heappush(events, (end, serial, how, job, place, now, False))

    start()
    while not queue.over:
        now, _, how, job, place, began, _ = heapq.heappop(events)
        if how == "back":
            queue.opened(place)
            start()
            continue
        worked = max(0.0, now - began - START) * speed[place]
        out.writes += (now - began) * (members[job] / interval + 1 / BEAT)
        if how == "ended":
            out.trained[job] = out.trained.get(job, 0) + 1
            out.done += jobs[job]
            queue.ended(job)
        else:
            out.interruptions += 1
            since = worked % (interval * speed[place]) if how == "lost" else 0.0
            left[job] -= worked - since
            out.lost += since + START
            queue.lost([job], place_too=how == "lost")
            if how == "lost":
                serial += 1
                heapq.heappush(events, (now + BACK, serial, "back", -1, place, now, False))
        start()
    out.makespan = now
    return out


def main() -> None:
    """Simulate, and print a row for each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--devices", default="64,512")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    specs = runs(given.runs)
    rate = gpus.speed("h100", 768)
    rows = []
    for devices in map(int, given.devices.split(",")):
        chosen = plan.single(plan.share_out(specs, devices))
        jobs = [sum(cost.seconds(spec, rate) for spec in job.specs) for job in chosen]
        chance = random.Random(0)
        outcome = simulate(jobs, [len(job.specs) for job in chosen], devices, chance)
        capacity = devices * (1 - STRAGGLERS * (1 - SLOW))
        bound = max(sum(jobs) / capacity, max(cost.seconds(spec, rate) for spec in specs))
        assert sorted(outcome.trained) == list(range(len(jobs)))
        row = {
            "devices": devices,
            "jobs": len(jobs),
            "makespan_hours": round(outcome.makespan / HOUR, 2),
            "lower_bound_hours": round(bound / HOUR, 2),
            "ratio": round(outcome.makespan / bound, 3),
            "interruptions": outcome.interruptions,
            "work_lost_percent": round(100 * outcome.lost / outcome.done, 3),
            "trained_twice": sum(times - 1 for times in outcome.trained.values()),
            "writes_per_second": round(outcome.writes / outcome.makespan, 1),
        }
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if given.json:
        given.json.write_text(json.dumps({"benchmark": "fleet", "runs": given.runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
