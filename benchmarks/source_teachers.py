"""Teachers for ``atdiag source``: of each architecture a masked autoencoder, and a supervised network as accurate.

    python -m benchmarks.source_teachers --out DIR [--runs DIR] [--json FILE]

writes DIR/mae/NAME.safetensors by the shared recipe (``atdiag pretrain NAME --objective mae``), and
DIR/supervised/NAME.safetensors (``atdiag pretrain NAME --scenes N --epochs E``) of the length in ``LENGTHS`` at which
the linear probe comes nearest to the masked autoencoder's. Accuracy grows with length, so lengths are tried by
bisection. Probes are those of ``source``: fitted on 2,500 images of each of five seeds, and tested on the same scenes.
The same line goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.execution.run import execute
from atdiag.reports import console
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import pretraining
from atdiag.training.provenance import environment

NAMES = ("deit_b", "dinov2_b", "clip_b", "beitv2_b")
LENGTHS = tuple((scenes, 2) for scenes in (125, 250, 375, 500, 625, 750, 875, 1000, 1250, 1500, 2000, 2500))
"""Scenes and epochs of supervised pre-training, the shortest first."""
SEEDS = 5


def train(specs: list[RunSpec], store: Store) -> None:
    """Train what is missing."""
    with console.training(len(specs), lambda: sum(not store.run(one).finished for one in specs)) as report:
        execute(specs, store, ExecutionOptions(device="cpu", threads=1), report)


def made(name: str, objective: str, length: tuple[int, int] | None, path: Path, store: Store) -> float:
    """Pre-train a teacher, write it, and return its linear probe's accuracy in per cent."""
    spec = pretraining.spec(name, objective, *(length or (None, None)))
    train([spec], store)
    path.parent.mkdir(parents=True, exist_ok=True)
    pretraining.export(store.run(spec), path)
    lab = Lab(resolve("mini", SEEDS, ["data.train=2500"], store.root))
    probe = lab.probe("probe", lab.teacher(str(path)))
    train(list(probe.specs), store)
    return fmean(float(store.run(one).result()["top1"]) for one in probe.specs)


def matched(name: str, wanted: float, out: Path, store: Store) -> tuple[tuple[int, int], dict[str, float]]:
    """Return the length whose supervised teacher is nearest to an accuracy, and those of all lengths tried."""
    tried: dict[int, float] = {}
    low, high = 0, len(LENGTHS) - 1
    while low <= high:
        middle = (low + high) // 2
        scenes, epochs = LENGTHS[middle]
        path = out / "tried" / f"{name}-{scenes}x{epochs}.safetensors"
        tried[middle] = made(name, "supervised", LENGTHS[middle], path, store)
        low, high = (middle + 1, high) if tried[middle] < wanted else (low, middle - 1)
    best = min(tried, key=lambda index: abs(tried[index] - wanted))
    return LENGTHS[best], {"x".join(map(str, LENGTHS[index])): value for index, value in sorted(tried.items())}


def main() -> None:
    """Make the teachers that are missing, and print their accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the teachers")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--json", type=Path, help="file of the accuracies")
    asked = parser.parse_args()
    store, rows = Store(asked.runs), dict[str, Any]()
    for name in NAMES:
        masked = made(name, "mae", None, asked.out / "mae" / f"{name}.safetensors", store)
        length, tried = matched(name, masked, asked.out, store)
        chosen = made(name, "supervised", length, asked.out / "supervised" / f"{name}.safetensors", store)
        rows[name] = {"mae": masked, "supervised": chosen, "length": length, "tried": tried}
        print(f"{name}: mae {masked:.1f} %, supervised {chosen:.1f} % ({length[0]} scenes x {length[1]})", flush=True)
        if asked.json:
            asked.json.write_text(
                json.dumps({"teachers": rows, "environment": environment(torch.device("cpu"))}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
