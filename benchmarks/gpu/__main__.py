"""Measure what only a GPU can show, in parts of at most eight minutes, the most important first.

    python -m benchmarks.gpu --part 1 --out benchmarks/results/gpu       # resumes if repeated
    python -m benchmarks.gpu --toy --out FOLDER                          # all of it on a CPU, at toy size

    1  doctor; copy and every loss equal to the CPU's float64; which SDPA kernel runs; no synchronisation, no graph
       break, no recompilation
    2  transfer_cost.py: ViT-B and ViT-S, bf16, compiled; atdiag cost: ViT-L, as in Li et al. 2024
    3  similarity.py: all pairs of heads of two ViT-B on 10,000 images; cohort.py and loader.py with ViT-S, on
       Imagenette-128 where it is found
    4  killed and resumed, out of memory and the suggested micro-batch, the tests marked cuda, deterministic.py
    5  a mini study equal to the CPU's within noise
    6  both real ViT-Ti on Imagenette-128: scratch, copy, distill, fine-tune; one seed. 7: two seeds, 8: three

After each measurement ``partN.json`` in ``--out`` is written: the machine, and the result or the traceback of a
failure. A failure does not stop the rest; the exit code is 1 if anything failed. ``benchmarks/README.md`` has the lines
for a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from atdiag.core import paths
from benchmarks.gpu import archive, equality, faults, study
from benchmarks.gpu.record import PROJECT, Record, SkippedError

PARTS = range(1, 9)
TOY_PARTS = range(1, 7)
SECONDS, TOY_SECONDS = 450.0, 3600.0
COSTS = (("b", 197, 128), ("b", 1370, 16), ("s", 197, 128), ("s", 1370, 16), ("b", 577, 44))
"""Sizes, tokens and batches that part 2 measures."""


def costs(record: Record) -> None:
    """Measure part 2."""
    if record.toy:
        toy = ("--size", "ti", "--tokens", "65", "--batch", "1", "--depth", "1", "--repeats", "1", "--no-memory")
        record.measure("cost, toy", lambda: record.script("transfer_cost", *toy))
        record.measure("atdiag cost", partial(study.methods, record))
        return
    record.measure("atdiag cost, ViT-L, batch 16", partial(study.methods, record))
    for size, tokens, batch in COSTS:
        words = ("--device", record.device.type, "--size", size, "--tokens", str(tokens), "--batch", str(batch))
        name = f"cost, ViT-{size.upper()}, {tokens} tokens, batch {batch}"
        record.measure(name, partial(record.script, "transfer_cost", *words))


def heads(record: Record, *words: str) -> Any:
    """Compare the heads of two networks, which nnsight reads. Raises SkippedError without it."""
    try:
        import nnsight  # noqa: F401  only whether it is there
    except ImportError:
        raise SkippedError("nnsight is not installed here") from None
    return record.script("similarity", *words)


def throughput(record: Record, data: Path) -> None:
    """Measure part 3."""
    device = record.device.type
    if record.toy:
        few = ("--images", "20", "--tokens", "65", "--depth", "1")
        record.measure("similarity", partial(heads, record, *few))
        toy = ("--steps", "6", "--batch", "8", "--repeats", "1")
        record.measure("cohort", lambda: record.script("cohort", *toy))
        sizes = ("--network", "mini", "--size", "32", "--batch", "8", "--steps", "2", "--repeats", "1", "--workers")
        record.measure("loader", lambda: record.script("loader", "--device", "cpu", *sizes))
        return
    try:
        paths.look_in(found := study.images(study.test_data(()), data))
        os.environ[paths.DATA] = str(found)
        words = ["--data", "imagenette", "--size", "s", "--batch", "256"]
    except SkippedError:
        words = []  # the embedded data; the result names the data set
    record.measure("similarity", partial(heads, record, "--device", device))
    settings = ("--device", device, "--threads", "8", "--repeats", "1")
    record.measure("cohort", lambda: record.script("cohort", *words, *settings))
    loader = ("--device", device, "--network", "vit_s", "--batch", "256", "--steps", "20", "--workers")
    record.measure("loader", lambda: record.script("loader", *loader))


def work(part: int, out: Path, runs: Path, toy: bool, seconds: float, only: Sequence[str] = ()) -> Record:
    """Measure one part, or only measurements whose names contain one of the given texts."""
    record = Record(out, part, toy, seconds, only)
    if part == 1:
        equality.part(record)
    elif part == 2:
        costs(record)
    elif part == 3:
        throughput(record, runs.parent / "data")
    elif part == 4:
        faults.part(record)
    else:
        study.part(record, runs)
    return record


def main() -> None:
    """Measure the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, help="default with --toy: all, one after the other")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "results" / "gpu", help="folder of JSON")
    parser.add_argument("--runs", type=Path, help="folder of runs, part 6 and on [default: OUT/runs]")
    parser.add_argument(
        "--restore", type=Path, metavar="FOLDER", help="unpack what an earlier visit brought back first"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing more is begun")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="measurements whose name contains one")
    parser.add_argument("--toy", action="store_true", help="all of it on a CPU, small")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        faults.child(asked.train, asked.device)
        return
    runs = asked.runs or asked.out / "runs"
    for line in archive.restore(asked.restore, runs) if asked.restore else ():
        print(f"restored {line}", flush=True)
    if asked.part is None and not asked.toy:
        if asked.restore:
            return
        parser.error("--part says which (1 first), or --toy tries all of it on a CPU")
    records = [
        work(part, asked.out, runs, asked.toy, TOY_SECONDS if asked.toy else asked.seconds, asked.only)
        for part in ([asked.part] if asked.part else TOY_PARTS)
    ]
    if bad := [f"part {record.part}, {name}" for record in records for name in record.failed]:
        sys.exit(f"{len(bad)} measurements failed: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
