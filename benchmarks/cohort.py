"""Six arms trained as one cohort against six separate runs, with the real loader: images per second.

    python benchmarks/cohort.py                            # the miniature of CLIP on a CPU, one thread
    python benchmarks/cohort.py --data imagenette --size s --device cuda

Also measured, in the same process: the cost of a step's parts (the batch, the teacher's forward pass, each student's
step). Their sum is the bound: a cohort needs one batch and one teacher pass for all, and a step for each student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from atdiag.core import progress
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.data import loader, sources
from atdiag.data.loader import Stream
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import loading
from atdiag.training import cohort, compiled, evaluation
from atdiag.training.provenance import environment
from atdiag.training.trainer import RunTrainer
from atdiag.transfer.observation import Observation, of_teacher


def arms(teacher: Teacher, data: Data, recipe: Recipe) -> list[RunSpec]:
    """Return scratch, copy and distillation, each with two model seeds: six runs on one stream."""
    network = teacher.network.student(classes=10)
    blocks = tuple(range(network.depth))
    transfers = [Transfer(), Transfer(method="copy", layers=blocks), Transfer(method="distill", layers=blocks)]
    return [
        RunSpec(
            network=network,
            teacher=teacher,
            transfer=transfer,
            data=data,
            recipe=recipe,
            seed=Seed(data=0, model=seed),
        )
        for seed in (0, 1)
        for transfer in transfers
    ]


def train(specs: list[RunSpec], load: Any, device: torch.device) -> float:
    """Train these runs; return seconds per step, from the end of the first steps to the end of the last."""
    marks: list[tuple[int, float]] = []

    def report(now: progress.Progress) -> None:
        if now.doing == "training":
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append((now.done, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        cohort.train(specs, Store(Path(folder)), load, ExecutionOptions(device=device.type), report)
    warm = len(marks) // 4  # the first steps include one-time costs
    (first, begin), (last, end) = marks[warm], marks[-2]  # the test follows the last step
    return (end - begin) / ((last - first) / len(specs))


def parts(specs: list[RunSpec], load: Any, device: torch.device, steps: int) -> dict[str, Any]:
    """Measure the median seconds of a step's parts: the batch, the teacher's pass, and each run's own step."""
    stream = Stream(specs[0].data, specs[0].recipe, specs[0].seed.data)
    source = next(spec.teacher for spec in specs if spec.teacher)
    teacher = load(source).to(device)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        members = [
            RunTrainer(store.create(s), s, teacher if s.teacher else None, {}, stream.steps_per_epoch, device)
            for s in specs
        ]
        if compiled.wanted(device):
            for network in (teacher, *(member.student for member in members)):
                compiled.compile_blocks(network)
        found: dict[str, list[float]] = {"batch": [], "teacher": [], **{str(i): [] for i in range(len(specs))}}
        # As a cohort does it: with workers the batch of the next step is made during this one.
        workers = loader.default_workers(stream.images, specs[0].recipe, device)
        batches = stream.batches(0, steps + 3, workers, device.type == "cuda")
        for turn in range(steps + 3):
            clock = Clock(device)
            batch = next(batches).to(device)
            laps = {"batch": clock.lap()}
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                shown = teacher.observe(batch.images, of_teacher(spec.transfer for spec in specs))
            laps["teacher"] = clock.lap()
            for i, member in enumerate(members):
                none = member.spec.transfer.method == "none"
                member.advance(batch, Observation() if none else evaluation.fit(shown, teacher, member.spec.network))
                laps[str(i)] = clock.lap()
            if turn > 2:
                for name, seconds in laps.items():
                    found[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    own = [medians.pop(str(i)) for i in range(len(specs))]
    return {**medians, "students": own}


class Clock:
    """Seconds between laps, synchronised with the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        elapsed, self.last = now - getattr(self, "last", now), now
        return elapsed


def published(size: str, image_size: int) -> tuple[Teacher, Any]:
    """Return a plain ViT of a published size with random weights, which do not affect the cost."""
    width, heads = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}[size]
    network = Network(image_size=image_size, patch_size=16, width=width, depth=12, heads=heads, classes=10)

    def load(teacher: Teacher) -> ViT:
        return students.build(teacher.network, 99).eval().requires_grad_(False)

    return Teacher(name=f"vit_{size}", profile="benchmark", network=network, sha256="0" * 64), load


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", default="digits", help="digits, or a set of real images by name (see atdiag data)")
    parser.add_argument("--size", default="ti", choices=("ti", "s", "b"), help="of the networks, on real images")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", nargs="?", const=Path("-"), help="write it (-: print it)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    batch = asked.batch or (32 if asked.device == "cpu" else 128)
    precision = "bfloat16" if asked.device == "cuda" else "float32"
    if asked.data == "digits":
        source, load = loading.shipped("clip_b"), loading.load
        data = Data(train=batch * asked.steps, test_per_source=1, clutter=6)
        recipe = Recipe(epochs=1, batch_size=batch, precision=precision)
    else:
        data = sources.complete(Data(name=asked.data, train=1, image_size=128, test_per_class=1))
        source, load = published(asked.size, 128)
        recipe = Recipe(epochs=1, batch_size=batch, precision=precision, crop=0.08, flip=True)
    specs = arms(source, data, recipe)
    together, apart, costs = [], [], []
    for _ in range(asked.repeats):
        together.append(train(specs, load, device))
        apart.append(sum(train([spec], load, device) for spec in specs))
        costs.append(parts(specs, load, device, asked.steps))
    middle = costs[len(costs) // 2]
    bound = middle["batch"] + middle["teacher"] + sum(middle["students"])
    images = len(specs) * batch
    document = {
        "benchmark": "cohort",
        "machine": environment(device),
        "data": data.name,
        "teacher": source.label,
        "arms": [spec.transfer.method for spec in specs],
        "batch": batch,
        "seconds_per_step": {"cohort": statistics.median(together), "separate": statistics.median(apart)},
        "parts": middle,
        "images_per_second": {
            "cohort": images / statistics.median(together),
            "separate": images / statistics.median(apart),
            "bound": images / bound,
        },
    }
    rate = document["images_per_second"]
    share = rate["cohort"] / rate["bound"]
    print(f"{source.label}, {data.name}, batch {batch}, {device}: {len(specs)} arms, images per second over all arms")
    for name, value in rate.items():
        print(f"  {name:9} {value:9.0f}")
    print(
        f"  parts of a step in ms: batch {1e3 * middle['batch']:.1f}, teacher {1e3 * middle['teacher']:.1f}, "
        f"students {', '.join(f'{1e3 * s:.1f}' for s in middle['students'])}"
    )
    print(f"  cohort / separate {rate['cohort'] / rate['separate']:.2f}")
    print(f"  {'met   ' if share >= 0.9 else 'MISSED'} cohort / bound {share:.2f} (target >= 0.90)")
    if asked.json == Path("-"):
        print(json.dumps(document))
    elif asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
