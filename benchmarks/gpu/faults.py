"""Part 4: reproducibility, out of memory, kill and resume, and the tests that need CUDA."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.execution import plan
from atdiag.networks.weights import loading
from atdiag.training import cohort
from atdiag.training.cohort import OutOfMemoryError
from benchmarks import kills
from benchmarks.gpu.record import PROJECT, Record, run

LIMIT = 3 * 2**30
"""Bytes of device memory available to a run that is meant to run out of memory."""
BATCH = 2048


def train(folder: Path, device: str) -> None:
    """Train the runs of ``kills.py`` in this process: deterministic, with a checkpoint after each step."""
    torch.set_num_threads(1)
    options = ExecutionOptions(device=device, deterministic=True, checkpoint_seconds=0.0)
    for group in plan.cohorts(kills.specs()):
        cohort.train(group, Store(folder), loading.load, options)


def _start(folder: Path, device: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--train", str(folder), "--device", device]


def killed_and_resumed(record: Record) -> dict[str, Any]:
    """Kill training with SIGKILL half-way; the resumed run must end with the same bytes."""
    device = record.device.type
    with tempfile.TemporaryDirectory() as name:
        meant, folder = Path(name) / "meant", Path(name) / "killed"
        run(_start(meant, device), record.left)
        environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        child = subprocess.Popen(_start(folder, device), cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
        try:
            while child.poll() is None and not any(folder.glob("*/checkpoint")):
                time.sleep(0.001)
            time.sleep(0.05)
        finally:
            child.send_signal(signal.SIGKILL)
            code = child.wait()
        assert code == -signal.SIGKILL, f"it ended with {code} before it was killed"
        reached = kills.steps(folder)
        run(_start(folder, device), record.left)
        faults = list(kills.same(folder, meant, reached))
    assert not faults, faults
    return {"steps_reached": reached, "runs": len(kills.specs()), "bit_for_bit": True}


def large() -> RunSpec:
    """Return a ViT-S on the embedded data, with a batch that does not fit in ``LIMIT``."""
    data = Data(train=BATCH, test_per_source=1, clutter=6)
    network = Network(image_size=20, patch_size=4, channels=1, width=384, depth=12, heads=6, classes=10)
    recipe = Recipe(epochs=1, batch_size=BATCH, precision="bfloat16")
    return RunSpec(network=network, data=data, recipe=recipe, seed=Seed(data=0, model=0))


def out_of_memory(record: Record) -> dict[str, Any]:
    """Check that running out of memory suggests a micro-batch, and that the same run completes with it."""
    spec = large()
    record.needs_cuda("a CPU's memory can't be limited (tests/training/test_micro_batch.py simulates it)")
    total = torch.cuda.get_device_properties(record.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            try:
                cohort.train([spec], store, loading.load, ExecutionOptions(device="cuda"))
            except OutOfMemoryError as fault:
                said = str(fault)
            else:
                raise AssertionError(f"a batch of {BATCH} fits in {LIMIT / 2**30:.0f} GiB: raise BATCH")
            found = re.search(r"`micro_batch` (\d+) fits", said)
            assert found, said
            size = int(found[1])
            torch.cuda.reset_peak_memory_stats()
            options = ExecutionOptions(device="cuda", micro_batch=size)
            status = cohort.train([spec], store, loading.load, options)
            assert set(status.values()) == {"finished"}, status
            peak = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"limit_gib": LIMIT / 2**30, "said": said, "micro_batch": size, "peak_gib": peak / 2**30}


def marked_tests(record: Record) -> str:
    """Run the tests marked ``cuda`` and return pytest's last line."""
    record.needs_cuda("the tests with the mark cuda skip themselves")
    files = [str(path) for path in sorted((PROJECT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    line = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "-q", "-p", "no:cacheprovider", *files]
    said = run(line, record.left).stdout.strip().splitlines()[-1]
    assert "passed" in said and "skipped" not in said, said
    return said


def part(record: Record) -> None:
    """Measure all of part 4."""
    small = ("--steps", "8", "--batch", "8") if record.toy else ("--threads", "4", "--steps", "200")
    device = record.device.type
    arguments = ("--device", device, *small)
    record.measure("killed and resumed", partial(killed_and_resumed, record))
    record.measure("out of memory", partial(out_of_memory, record))
    record.measure("tests with the mark cuda", partial(marked_tests, record))
    record.measure("deterministic", lambda: record.script("deterministic", *arguments))
    if not record.toy:
        biased = ("--device", device, "--threads", "4", "--teacher", "beitv2_b")
        record.measure("deterministic, position bias", lambda: record.script("deterministic", *biased))


def child(folder: Path, device: str) -> None:
    """Train as ``--train`` requests."""
    with suppress(KeyboardInterrupt):
        train(folder, device)
