"""Test whether a run on a GPU is reproducible: with --deterministic, without it, and when interrupted half-way.

    python benchmarks/deterministic.py --json benchmarks/results/deterministic.json      # a miniature on CUDA
    python benchmarks/deterministic.py --teacher beitv2_b                                # with a relative position bias
    python benchmarks/deterministic.py --data imagenette --data-dir DIR --size s --image-size 224 --steps 200
    python benchmarks/deterministic.py --device cpu --steps 8                            # tests the script

A cohort (scratch, copy, distillation) with Mixup, CutMix, drop path and an average of the weights is trained five
times, each time by a process of its own, as the command line does: twice with the option and twice without, in turns,
and once with it by two processes, of which the first is stopped in the middle of an epoch. Reported for each pair: the
largest difference between two stored weights of a run, the difference of its accuracies, and how many test images are
classified differently; and what the option costs in time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from atdiag.core import paths, progress
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.data import sources
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import loading
from atdiag.training import cohort, compiled
from atdiag.training.provenance import environment, hardware

SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
EPOCHS = 2


def load(teacher: Teacher) -> ViT | Foreign:
    """Return a miniature, or a plain ViT with random weights, which do not affect rounding behaviour."""
    if teacher.profile == "mini":
        return loading.load(teacher)
    return students.build(teacher.network, 99).eval().requires_grad_(False)


def arms(asked: argparse.Namespace) -> dict[str, RunSpec]:
    """Return scratch, copy and distillation of all blocks, by name."""
    values = {"lr": 1e-3, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema": 0.9}
    images = asked.batch * asked.steps // EPOCHS
    if asked.data == "digits":
        source = loading.shipped(asked.teacher)
        data = Data(train=images, test_per_source=1, clutter=6)
    else:
        found = sources.complete(Data(name=asked.data, train=1, image_size=asked.image_size))
        data = found.model_copy(update={"train": min(images, found.train)})
        width, heads = SIZES[asked.size]
        shape = {"image_size": asked.image_size, "patch_size": 16, "width": width, "depth": 12, "heads": heads}
        network = Network(**shape, classes=sources.find(data).classes)
        source = Teacher(name=f"vit_{asked.size}", profile="benchmark", network=network, sha256="0" * 64)
        values |= {"crop": 0.08, "flip": True, "erase": 0.25}
    recipe = Recipe(epochs=EPOCHS, batch_size=asked.batch, precision=asked.precision, **values)
    blocks = tuple(range(source.network.depth))
    transfers = {
        "scratch": Transfer(),
        "copy": Transfer(method="copy", layers=blocks),
        "distill": Transfer(method="distill", layers=blocks),
    }
    return {
        name: RunSpec(
            network=source.network.student(classes=sources.find(data).classes),
            teacher=source,
            transfer=transfer,
            data=data,
            recipe=recipe,
            seed=Seed(data=0, model=0),
        )
        for name, transfer in transfers.items()
    }


def train(specs: Sequence[RunSpec], folder: Path, device: str, threads: int, option: bool, stop: int | None) -> float:
    """Train a cohort in this process, up to step ``stop`` if given; return median seconds per step after warm-up."""
    torch.set_num_threads(threads)
    marks: list[float] = []

    def report(now: progress.Progress) -> None:
        if now.doing == "training":
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    status = cohort.train(
        specs,
        Store(folder),
        load,
        ExecutionOptions(device=device, deterministic=option),
        report,
        should_stop=lambda: len(marks) == stop,
    )
    expected = {"finished"} if stop is None else {"interrupted"}
    if set(status.values()) != expected:
        raise RuntimeError(f"a run did not end as it should: {status}")
    return statistics.median(np.diff(marks[len(marks) // 4 :]).tolist())


def difference(arms: dict[str, RunSpec], one: Store, other: Store) -> dict[str, Any]:
    """Return the differences between two trainings of a cohort, by arm."""
    out: dict[str, Any] = {}
    for name, spec in arms.items():
        runs = one.run(spec), other.run(spec)
        left, right = (load_file(run.weights) for run in runs)
        said = [np.load(run.predictions)["prediction"] for run in runs]
        out[name] = {
            "weights": max((left[key] - right[key]).abs().max().item() for key in left),
            "points": runs[1].result()["top1"] - runs[0].result()["top1"],
            "images_classified_differently": int((said[0] != said[1]).sum()),
        }
    return out


def measure(arms: dict[str, RunSpec], asked: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Train everything; return the differences by pair, and seconds per step with and without the option."""
    specs = list(arms.values())
    seconds: dict[str, list[float]] = {"deterministic": [], "free": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def alone(folder: str, option: bool, stop: int | None = None) -> float:
            context = multiprocessing.get_context("spawn")  # separate processes: cuBLAS sets its workspace once
            with ProcessPoolExecutor(1, mp_context=context) as process:
                order = (specs, root / folder, asked.device, asked.threads, option, stop)
                return process.submit(train, *order).result()

        for turn in "ab":
            seconds["deterministic"].append(alone(f"deterministic {turn}", True))
            seconds["free"].append(alone(f"free {turn}", False))
        epoch = specs[0].data.train // asked.batch
        alone("interrupted", True, stop=epoch + epoch // 2)
        alone("interrupted", True)
        pairs = {
            "deterministic, again": ("deterministic a", "deterministic b"),
            "deterministic, interrupted and resumed": ("deterministic a", "interrupted"),
            "free, again": ("free a", "free b"),
            "deterministic and free": ("deterministic a", "free a"),
        }
        found = {pair: difference(arms, Store(root / one), Store(root / other)) for pair, (one, other) in pairs.items()}
    return found, seconds


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--data", default="digits", help="digits, or a set of real images by name (see atdiag data)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--teacher", default="clip_b", help="the miniature, on digits")
    parser.add_argument("--size", default="s", choices=SIZES, help="of the networks, on real images")
    parser.add_argument("--image-size", type=int, default=128, help="of real images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400, help="of a run, in two epochs; at least 8")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="[default: bfloat16 on CUDA]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here (--device cpu tests the script)", file=sys.stderr)
        sys.exit(2)
    if asked.data_dir:
        paths.look_in(asked.data_dir)
    asked.steps = max(asked.steps, 8)  # a run resumed half-way through the last epoch has steps left to time
    asked.precision = asked.precision or ("bfloat16" if asked.device == "cuda" else "float32")
    device = torch.device(asked.device)
    specs = arms(asked)
    found, seconds = measure(specs, asked)
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    some = next(iter(specs.values()))
    document = {
        "benchmark": "deterministic",
        "machine": {**environment(device), **hardware(device)},
        "compiled": compiled.wanted(device),
        "teacher": asked.teacher if asked.data == "digits" else f"vit_{asked.size}, random weights",
        "network": some.network.model_dump(mode="json"),
        "data": some.data.model_dump(mode="json"),
        "recipe": some.recipe.model_dump(mode="json"),
        "differences": found,
        "seconds_per_step": {"median": cost, "all": seconds},
        "deterministic_over_free": cost["deterministic"] / cost["free"],
    }
    print(f"{document['teacher']}, {some.data.name}, batch {asked.batch}, {asked.precision}, {asked.device}")
    print(f"{'':>40} {'largest difference of a weight':>32} {'points':>8} {'images':>8}")
    for pair, by_arm in found.items():
        far = max(one["weights"] for one in by_arm.values())
        points = max((one["points"] for one in by_arm.values()), key=abs)
        images = max(one["images_classified_differently"] for one in by_arm.values())
        print(f"{pair:>40} {far:>32.3g} {points:>+8.2f} {images:>8}")
    print(f"a step with the option takes {document['deterministic_over_free']:.2f} times as long")
    for pair in list(found)[:2]:
        same = all(one["weights"] == 0 for one in found[pair].values())
        print(f"  {'met   ' if same else 'MISSED'} {pair}: bit for bit")
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
