"""Teachers for ``atdiag source``: of each architecture a masked autoencoder, and a supervised network as accurate.

    python -m benchmarks.source_teachers --out DIR [--runs DIR] [--json FILE]

writes DIR/mae/NAME.safetensors by the shared recipe (``atdiag pretrain NAME --objective mae``), and
DIR/supervised/NAME.safetensors by the supervised recipe with ``LENGTHS``' scenes and epochs (``atdiag pretrain NAME
--scenes N --epochs E``): of the lengths that were tried (docs/why.md), that whose linear probe is nearest to the masked
autoencoder's. Probes are those of ``source``: fitted on 2,500 images of each of five seeds, and tested on the same
scenes. The same line goes on where it was stopped.
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

LENGTHS = {"deit_b": (64, 1), "dinov2_b": (250, 2), "clip_b": (64, 1), "beitv2_b": (1000, 2)}
"""Scenes and epochs of supervised pre-training, by teacher."""
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


def main() -> None:
    """Make the teachers that are missing, and print their accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the teachers")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--json", type=Path, help="file of the accuracies")
    asked = parser.parse_args()
    store, rows = Store(asked.runs), dict[str, Any]()
    for name, length in LENGTHS.items():
        rows[name] = {
            kind: made(name, kind, None if kind == "mae" else length, asked.out / kind / f"{name}.safetensors", store)
            for kind in ("mae", "supervised")
        }
        print(f"{name}: {', '.join(f'{kind} {top1:.1f} %' for kind, top1 in rows[name].items())}", flush=True)
        if asked.json:
            asked.json.write_text(
                json.dumps({"teachers": rows, "environment": environment(torch.device("cpu"))}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
