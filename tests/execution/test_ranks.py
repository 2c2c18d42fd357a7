"""Training over ranks by the local executor: real processes, gloo."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atdiag.core.errors import FaultError, StoppedError, UserError
from atdiag.core.runs import Store
from atdiag.execution import cost, devices, plan, torchrun
from atdiag.execution.inprocess import InProcessExecutor
from atdiag.execution.local import LocalExecutor
from atdiag.execution.order import Order
from atdiag.execution.plan import Job
from atdiag.execution.run import execute
from tests.execution.specs import ONE, run

TWO, THREE = (replace(ONE, ranks=ranks, checkpoint_seconds=0.0) for ranks in (2, 3))
SPEC = run(train=96, epochs=1, mixup=0.8, drop_path=0.1, ema=0.9)
LONG = run(train=96, epochs=40, mixup=0.8, drop_path=0.1, ema=0.9)
"""120 steps; of 32 images 3 ranks have 10, 10 and 12."""


def assert_close(one: Store, other: Store, spec) -> None:
    here, there = (load_file(store.run(spec).weights) for store in (one, other))
    for name, value in here.items():
        # Of queries, keys and values, the bias of keys has a gradient that is only rounding, which AdamW normalises.
        keep = [0, 2] if name.endswith("qkv.bias") else [0, 1, 2] if name.endswith("qkv.weight") else [0]
        parts = list(zip(*(t.chunk(3 if "qkv" in name else 1) for t in (value, there[name])), strict=True))
        assert all(torch.allclose(*parts[i], rtol=0, atol=1e-5) for i in keep), name
    lines = [store.run(spec).progress() for store in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert lines[0][-1]["loss"] == pytest.approx(lines[1][-1]["loss"], rel=1e-4)
    p, q = (np.load(store.run(spec).predictions) for store in (one, other))
    assert (p["label"] == q["label"]).all()
    assert p["log_p"] == pytest.approx(q["log_p"], abs=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs in one process."""
    store = Store(tmp_path_factory.mktemp("alone"))
    execute([SPEC, LONG], store, ONE, executor=InProcessExecutor())
    return store


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path):
    one, two, told = Store(tmp_path / "one"), Store(tmp_path / "two"), []
    execute([SPEC], one, ONE, executor=InProcessExecutor())
    execute([SPEC], two, TWO, told.append, executor=LocalExecutor())
    assert_close(one, two, SPEC)
    assert (told[-1].done, told[-1].total, told[-1].images) == (3, 3, 96)
    assert two.run(SPEC).result()["environment"]["ranks"] == 2
    assert {path.name for path in two.run(SPEC).path.iterdir()} == {path.name for path in one.run(SPEC).path.iterdir()}


# --- interruptions -------------------------------------------------------------------------------------------------


def followers(process: int) -> list[int]:
    """Return the processes that a training process has started, in order."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@contextlib.contextmanager
def three(store: Store):
    """Start training over three ranks, as a worker that reads its order; yield it, and its ranks, at work."""
    store.root.mkdir(parents=True, exist_ok=True)
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "atdiag.execution.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        worker.stdin.write(Order(store.root, THREE, 1, (), ((LONG,),)).to_json() + "\n")
        worker.stdin.flush()
        until = time.monotonic() + 300
        while not store.run(LONG).checkpoint.exists():
            assert worker.poll() is None, worker.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield worker, [worker.pid, *followers(worker.pid)]
    finally:
        worker.kill()
        worker.communicate()


def end(worker, ranks) -> str:
    """Wait until all ranks have ended, and return what the first one said."""
    said = worker.communicate(timeout=200)[1]
    until = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < until, "a rank goes on"
        time.sleep(0.05)
    return said


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("rank", "sign"), [(2, signal.SIGTERM), (1, signal.SIGUSR1), (0, signal.SIGUSR1)])
def test_a_signal_to_any_rank_stops_all_and_another_number_goes_on(tmp_path, alone, rank, sign):
    store = Store(tmp_path / "runs")
    with three(store) as (worker, ranks):
        assert len(ranks) == 3
        os.kill(ranks[rank], sign)
        end(worker, ranks)
        assert worker.returncode == 143
    stopped = store.run(LONG)
    assert stopped.state == "interrupted"
    assert not list(stopped.path.glob(".*-*"))
    step = torch.load(stopped.checkpoint, weights_only=True)["step"]
    assert 0 < step < 120
    execute([LONG], store, ONE if rank else TWO)
    assert store.run(LONG).result()["origin"]["from_step"] == step
    assert_close(alone, store, LONG)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_ends_the_others_and_one_process_goes_on(tmp_path, alone, rank):
    store = Store(tmp_path / "runs")
    with three(store) as (worker, ranks):
        os.kill(ranks[rank], signal.SIGKILL)
        said = end(worker, ranks)
        if rank:
            assert worker.returncode == 1
            assert said.strip().splitlines()[-1].endswith("FaultError: rank 2 was ended by SIGKILL")
    assert store.run(LONG).state == "interrupted"
    execute([LONG], store, ONE)
    assert store.run(LONG).result()["origin"]["from_step"] > 0
    assert_close(alone, store, LONG)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_local_executor_tells_which_rank_failed(tmp_path, sign):
    store, executor = Store(tmp_path / "runs"), LocalExecutor()
    store.root.mkdir()
    executor.submit([Job(((LONG,),))], store, THREE)
    error, text = (
        (FaultError, r"rank 1 was ended by SIGKILL.*goes on") if sign == 9 else (StoppedError, "asked to stop")
    )
    with pytest.raises(error, match=text):
        while (update := executor.poll()) is not None:
            if update.progress.done and sign:  # once, when all ranks train
                (worker,) = executor._workers.values()
                os.kill(followers(worker.pid)[0], sign)
                sign = 0
    executor.cancel()
    assert store.run(LONG).state == "interrupted"


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_more_ranks_than_images(tmp_path):
    plain, mixed = run(train=64), run(train=64, mixup=0.8)
    store = Store(tmp_path / "runs")
    with pytest.raises(
        UserError, match=r"`ranks` 33 for a batch of 32 images: give 32 ranks at most, or `recipe\.batch_size`=33"
    ):
        execute([plain], store, replace(ONE, ranks=33))
    with pytest.raises(
        UserError, match="`ranks` 17 for a batch of 32 images, 16 pairs of images that are mixed: give 16"
    ):
        plan.make([mixed], store, replace(ONE, ranks=17))
    assert not store.root.exists()
    plan.make([run(epochs=0), plain], store, replace(ONE, ranks=32))


def test_an_executor_of_one_process_refuses_ranks(tmp_path):
    with pytest.raises(UserError, match="`ranks` 2: InProcessExecutor trains a run in one process: leave `ranks` out"):
        execute([SPEC], Store(tmp_path / "runs"), TWO, executor=InProcessExecutor())
    assert not (tmp_path / "runs").exists()


def test_too_few_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    devices.fit_ranks(replace(ONE, ranks=2), "cuda")
    devices.fit_ranks(replace(ONE, ranks=40), "cpu")
    with pytest.raises(UserError, match=r"`ranks` 3 on cuda: each needs a device of its own, .* has 2: give 1 to 2"):
        devices.fit_ranks(replace(ONE, ranks=3), "cuda")
    with pytest.raises(UserError, match="this machine has 1: leave `ranks` out"):
        devices.fit_ranks(replace(ONE, ranks=2), "mps")


def test_a_process_of_several_ranks_takes_the_cores_of_each(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    assert devices.processes_for("cpu", 1, 2) == 4
    assert devices.processes_for("cpu", 2, 3) == 1
    assert devices.processes_for("cpu", None, 2) == 1


def test_the_speed_of_a_run_over_ranks_is_that_of_one(tmp_path, monkeypatch):
    result = {"seconds": 100.0, "environment": {"device": "cpu", "ranks": 4}}

    class Finished:
        spec = run(epochs=400)

        def result(self):
            return result

    store = Store(tmp_path)
    monkeypatch.setattr(Store, "list", lambda self: [Finished()] * 3)
    four = cost.measured_speed(store, "cpu")
    result["environment"].pop("ranks")
    assert cost.measured_speed(store, "cpu") == pytest.approx(4 * four)


def test_what_torchrun_has_started(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (torchrun.world(), torchrun.ranks(3), torchrun.executor()) == (1, 3, None)
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 4), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    assert (torchrun.world(), torchrun.ranks(1), torchrun.ranks(4)) == (4, 4, 4)
    with pytest.raises(UserError, match="`ranks` 2, but torchrun has started 4: leave `ranks` out"):
        torchrun.ranks(2)
    with pytest.raises(UserError, match="each would train by itself: start it once, with `ranks`"):
        torchrun.executor()


# --- torchrun ------------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "atdiag"]
TINY = ["--set=data.train=64", "--set=data.test_per_source=1", "--set=recipe.epochs=1", "--seeds=1"]


def under_torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess:
    places = [f"--runs={folder / 'runs'}", f"--out={folder / 'out'}"]
    return subprocess.run([*TORCHRUN, *words, *places], capture_output=True, text=True, timeout=500, cwd=Path.cwd())


@pytest.mark.slow
def test_a_command_under_torchrun(tmp_path):
    command = ["layers", "--from", "top", "--k", "6", *TINY]
    done = under_torchrun(tmp_path, *command, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.stdout.count("atdiag layers:") == 1  # one rank speaks
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")]
    assert {one["environment"]["ranks"] for one in results} == {2}
    alone = [
        sys.executable,
        "-m",
        "atdiag",
        *command,
        "--json",
        f"--runs={tmp_path / 'one'}",
        f"--out={tmp_path / 'two'}",
    ]
    other = json.loads(
        subprocess.run(alone, capture_output=True, text=True, timeout=500).stdout.strip().splitlines()[-1]
    )
    assert record["studies"][0]["contrasts"] == other["studies"][0]["contrasts"]


@pytest.mark.slow
def test_wrong_input_under_torchrun_is_one_line(tmp_path):
    done = under_torchrun(tmp_path, "layers", "--from", "top", "--k", "6", "--ranks", "3", *TINY)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("atdiag:")]
    assert said == ["atdiag: --ranks 3, but torchrun has started 2: leave --ranks out"]
    assert not (tmp_path / "runs").exists()
