"""Test whether the loader keeps up: images per second of decoding and augmentation versus a training step's demand.

    python benchmarks/loader.py [--data-dir FOLDER] [--device cuda] [--network vit_s] [--json FILE]

One process measures the loader alone (with and without the decoded cache, by number of workers), the training step
alone on batches that are on the device already, and both together: the share of the time in which the step waits for
its batch. Rounds take turns over all of it, and medians are reported. The data set is Imagenette (--data names another
one); where it is not found, made-up images of 128 x 128 take its place, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from atdiag.core import paths, resources
from atdiag.core.spec import Data, Network, Recipe
from atdiag.data import loader, sources
from atdiag.data.catalogue import FACTS
from atdiag.data.decoding import ImageFolder
from atdiag.data.loader import Batch, Stream
from atdiag.networks.model import students
from atdiag.training.provenance import environment

NETWORKS = {
    "vit_s": {"patch_size": 16, "width": 384, "depth": 12, "heads": 6},
    "mini": {"patch_size": 16, "width": 64, "depth": 12, "heads": 4},
}


def recipe(batch: int) -> Recipe:
    """Return a recipe with DeiT's augmentation."""
    return Recipe(
        epochs=1,
        batch_size=batch,
        crop=0.08,
        flip=True,
        erase=0.25,
        rand_augment="rand-m9-mstd0.5-inc1",
        mixup=0.8,
        cutmix=1.0,
    )


def make_up(folder: Path, count: int = 1024) -> str:
    """Create a data set of smooth random JPEGs of 128 x 128 pixels in two classes; return its name."""
    draw = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            path = folder / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(path, quality=70)
    return f"folder:{folder}"


class Step:
    """A plain training step: forward, backward and update of a student."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.device = device
        self.student = students.build(network, 0).to(device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, fused=True)

    def __call__(self, batch: Batch) -> None:
        """Train on a batch on the device, and wait until done."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.student(batch.images)
        F.cross_entropy(logits.float(), batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def alone(stream: Stream, workers: int, steps: int) -> float:
    """Return the loader's images per second, once its workers are running."""
    batches = stream.batches(0, steps + _ahead(workers), workers)
    for _ in range(_ahead(workers)):
        next(batches)
    begin = time.perf_counter()
    count = sum(len(batch.labels) for batch in batches)
    return count / (time.perf_counter() - begin)


def _ahead(workers: int) -> int:
    """Return the number of initial batches to skip: those made while nothing waited for them."""
    return max(1, workers * loader.PREFETCH)


def demand(step: Step, batch: Batch, steps: int) -> float:
    """Return the images per second that the step consumes, on a batch on the device."""
    there = batch.to(step.device)
    step(there)
    begin = time.perf_counter()
    for _ in range(steps):
        step(there)
    return steps * len(batch.labels) / (time.perf_counter() - begin)


def together(stream: Stream, step: Step, workers: int, steps: int) -> tuple[float, float]:
    """Return images per second of training from the loader, and the share of time spent waiting for batches.

    The first batches are not counted, until the buffer of those that were made ahead is used up: a loader of three
    quarters of the step's rate fills in four times its length.
    """
    skip = 4 * _ahead(workers)
    pin = step.device.type == "cuda"
    waited = begin = 0.0
    batches = stream.batches(0, steps + skip, workers, pin)
    for index in range(steps + skip):
        if index == skip:
            waited, begin = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch.to(step.device))
    total = time.perf_counter() - begin
    batches.close()
    return steps * stream.recipe.batch_size / total, waited / total


def measure(data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all figures, as lists over the rounds."""
    device = torch.device(options.device)
    own = recipe(options.batch)
    cached = Stream(data, own, 0)
    assert isinstance(cached.images, ImageFolder)
    direct = Stream(data, own, 0)
    direct.images = ImageFolder(cached.images.files, cached.images.view)
    streams = {"decoded anew": direct} | ({"cached": cached} if cached.images.decoded else {})
    assert data.image_size is not None
    network = Network(image_size=data.image_size, classes=sources.find(data).classes, **NETWORKS[options.network])
    step = Step(network, device)
    default = loader.default_workers(cached.images, own, device)
    counts = sorted({0, *options.workers, default})
    out: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        out.setdefault(name, []).append(value)

    for _ in range(options.repeats):
        add("step", demand(step, cached.batch(0), options.steps))
        for kind, stream in streams.items():
            for workers in counts:
                add(f"loader, {kind}, {workers} workers", alone(stream, workers, options.steps))
                rate, waiting = together(stream, step, workers, options.steps)
                add(f"training, {kind}, {workers} workers", rate)
                add(f"waiting, {kind}, {workers} workers", waiting)
    return {"default_workers": default, "counts": counts, "kinds": list(streams), "all": out}


def show(measured: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """Print the table."""
    median = {name: statistics.median(values) for name, values in measured["all"].items()}
    say(f"the step alone asks for {median['step']:,.0f} images/s")
    say(f"{'':>14} {'workers':>8} {'loader':>10} {'loader/step':>12} {'training':>10} {'waiting':>8}")
    for kind in measured["kinds"]:
        for workers in measured["counts"]:
            at = f"{kind}, {workers} workers"
            rate, train, wait = (median[f"{what}, {at}"] for what in ("loader", "training", "waiting"))
            mark = " (default)" if workers == measured["default_workers"] else ""
            ratio = rate / median["step"]
            say(f"{kind:>14} {workers:>8} {rate:>10,.0f} {ratio:>12.2f} {train:>10,.0f} {wait:>8.1%}{mark}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenette")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", choices=NETWORKS, default="vit_s")
    parser.add_argument("--size", type=int, default=128, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of the step on a CPU [default: torch's]")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.workers = [count for count in options.workers if count <= resources.available_cores()]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.data_dir:
        paths.look_in(options.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        name = options.data
        if name in FACTS and sources.find(name).folder() is None:
            print(f"{name} is not found: made-up images of 128 x 128 in its place")
            name = make_up(Path(folder))
        data = sources.complete(Data(name=name, train=1, image_size=options.size))
        measured = measure(data, options)
    said = {"data": options.data if name == options.data else "made up", "images": data.train}
    said |= {key: getattr(options, key) for key in ("network", "size", "batch", "steps", "repeats")}
    print(", ".join(f"{key} {value}" for key, value in said.items()))
    show(measured)
    if options.json:
        document = {"environment": environment(torch.device(options.device)), "settings": said, **measured}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
