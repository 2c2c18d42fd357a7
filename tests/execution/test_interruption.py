"""A command that was killed, then terminated, resumes and ends with the same weights."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.execution.run import execute
from atdiag.networks.weights import loading
from atdiag.training import cohort
from tests.execution.specs import ONE, TINY, study

COMMAND = [sys.executable, "-P", "-m", "atdiag.cli.app", "reinit", "--seeds", "1"]


LONGER = "recipe.epochs=8"


@contextlib.contextmanager
def one_core():
    """Give the process one core, so that commands started from it plan one worker."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, [min(cores)])
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def begin(folder: Path, specs) -> subprocess.Popen:
    """Start the command with one worker; return when that has started to train."""
    sets = [word for item in (*TINY, LONGER) for word in ("--set", item)]
    with one_core():
        main = subprocess.Popen(
            [*COMMAND, *sets, "--runs", str(folder / "runs"), "--out", str(folder / "out")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    store = Store(folder / "runs")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if all(store.run(spec).state == "training" for spec in specs):
            return main
        assert main.poll() is None, main.stderr.read()
        time.sleep(0.05)
    main.kill()
    pytest.fail("the workers did not begin")


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_then_terminated_then_completed(tmp_path, one_worker):
    planned = study(LONGER)
    specs = [arm.specs[0] for arm in planned.arms]
    store = Store(tmp_path / "runs")

    main = begin(tmp_path, specs)
    main.kill()
    main.communicate()
    # Nothing signals the workers: they notice that their standard input has closed, write checkpoints and end.
    until(lambda: all(store.run(spec).state == "interrupted" for spec in specs))
    reached = {spec.id: torch.load(store.run(spec).checkpoint, weights_only=True)["step"] for spec in specs}
    assert all(0 < step < 16 for step in reached.values())

    main = begin(tmp_path, specs)
    main.send_signal(signal.SIGTERM)
    _, said = main.communicate(timeout=60)
    assert main.returncode == 143
    assert said.strip().splitlines()[-1].startswith("atdiag: stopped: checkpoints are written")
    assert all(store.run(spec).state == "interrupted" for spec in specs)  # at once: main waited for its workers
    for spec in specs:
        assert torch.load(store.run(spec).checkpoint, weights_only=True)["step"] > reached[spec.id]

    execute(planned.specs, store, ONE)
    unbroken = Store(tmp_path / "unbroken")
    cohort.train(specs, unbroken, loading.load, ExecutionOptions(device="cpu"))
    for spec in specs:
        one, other = (load_file(place.run(spec).weights) for place in (store, unbroken))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        lines = [place.run(spec).progress() for place in (store, unbroken)]
        assert [len(found) for found in lines] == [8, 8]
        for here, there in zip(*lines, strict=True):
            assert here | {"seconds": 0} == there | {"seconds": 0}
        assert json.loads((store.run(spec).path / "result.json").read_text())["steps"] == 16
