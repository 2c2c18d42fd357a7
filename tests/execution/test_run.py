"""Which runs are trained where, and that each is trained once, whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ablations.reinit import reinit
from atdiag.core.errors import FaultError, StoppedError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.execution import devices
from atdiag.execution.cost import seconds
from atdiag.execution.plan import cohorts, estimate, pending, share_out
from atdiag.execution.run import execute
from atdiag.networks.weights import loading
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from atdiag.training import cohort

TINY = ("data.train=64", "recipe.warmup_epochs=0.5", "data.test_per_source=1")


def network(**fields) -> Network:
    return Network(image_size=20, patch_size=4, channels=1, width=32, depth=12, heads=2, classes=10, **fields)


def run(seed=0, epochs=4, layers=(), teacher=None, train=2500, start="scratch", **recipe) -> RunSpec:
    needs = teacher if layers or start == "teacher" else None
    return RunSpec(
        network=network(),
        teacher=needs and Teacher(name=f"t{needs}", profile="mini", network=network(), sha256=f"{needs}" * 64),
        init=Init(source=start),
        transfer=Transfer(method="copy", layers=layers) if layers else Transfer(),
        data=Data(train=train),
        recipe=Recipe(epochs=epochs, batch_size=32, warmup_epochs=0, **recipe),
        seed=Seed(data=seed, model=seed),
    )


ONE = ExecutionOptions(device="cpu", threads=1)

RUNS = st.lists(
    st.builds(
        run,
        seed=st.integers(0, 3),
        epochs=st.integers(0, 40),
        layers=st.sampled_from([(), (0,), (11,), tuple(range(12))]),
        teacher=st.sampled_from([1, 2]),
        train=st.sampled_from([64, 2500]),
        start=st.sampled_from(["scratch", "teacher"]),
    ),
    max_size=20,
    unique_by=lambda spec: spec.id,
)


# --- planning ------------------------------------------------------------------------------------------------------


@given(RUNS)
def test_a_cohort_shares_stream_and_teacher(specs):
    groups = cohorts(specs)
    assert sorted(spec.id for group in groups for spec in group) == sorted(spec.id for spec in specs)
    for group in groups:
        assert len({spec.stream for spec in group}) == 1
        assert len({spec.teacher.sha256 for spec in group if spec.teacher}) <= 1
    # as few as there can be: one for each stream and teacher, and one for each stream that no teacher has
    pairs = {(spec.stream, spec.teacher.sha256) for spec in specs if spec.teacher}
    alone = {spec.stream for spec in specs} - {stream for stream, _ in pairs}
    assert len(groups) == len(pairs) + len(alone)


def test_the_baseline_joins_its_teacher_s_cohort():
    baseline, copy, other = run(), run(layers=(0,), teacher=1), run(seed=1, layers=(0,), teacher=1)
    assert baseline.teacher is None
    assert [{s.id for s in group} for group in cohorts([baseline, copy, other])] == [
        {baseline.id, copy.id},
        {other.id},
    ]


@given(RUNS, st.integers(1, 6))
def test_a_plan_covers_every_run_once_and_is_balanced(specs, processes):
    jobs = share_out(specs, processes)
    assert sorted(spec.id for job in jobs for spec in job.specs) == sorted(spec.id for spec in specs)
    assert len(jobs) <= processes
    assert all(job.specs for job in jobs)
    costs = [seconds(spec) for spec in specs]
    for job in jobs:
        share = sum(costs) / min(processes, len(specs))
        assert sum(seconds(spec) for spec in job.specs) <= share + max(costs) + 1e-9
        for group in job.cohorts:
            assert len({spec.stream for spec in group}) == 1
            assert len({spec.teacher.sha256 for spec in group if spec.teacher}) <= 1
    # each border between two processes splits one cohort at most
    pieces = sum(len(job.cohorts) for job in jobs)
    assert pieces <= len(cohorts(specs)) + max(len(jobs) - 1, 0)


@given(RUNS, st.integers(1, 6), st.integers(1, 5))
def test_the_estimate(specs, processes, times):
    if not specs:
        assert estimate(specs, processes) == 0
        return
    costs = [seconds(spec) for spec in specs]
    found = estimate(specs, processes) - estimate([run(epochs=0)], 1) + seconds(run(epochs=0))
    assert sum(costs) / processes - 1e-6 <= found <= sum(costs) + 1e-6
    assert estimate(specs, 1) >= estimate(specs, processes) - 1e-6
    assert estimate(specs[:-1], 1) <= estimate(specs, 1) + 1e-6


def test_what_costs_more():
    base = seconds(run())
    assert seconds(run(epochs=8)) > 1.9 * base
    assert seconds(run(train=5000)) > 1.9 * base
    assert seconds(run(layers=(0,), teacher=1)) == pytest.approx(base, rel=0.05)
    assert seconds(run(layers=(11,), teacher=1)) > seconds(run(layers=(0,), teacher=1))
    assert 0 < seconds(run(epochs=0)) < base / 5
    assert seconds(run(train=31)) == seconds(run(epochs=0))  # not one whole batch


def test_finished_runs_are_not_pending(tmp_path):
    store = Store(tmp_path)
    specs = [run(seed=s) for s in range(3)]
    store.create(specs[1]).finish({})
    assert pending(specs, store) == [specs[0], specs[2]]
    store.create(specs[0])  # begun is not finished
    assert pending(specs, store) == [specs[0], specs[2]]


def test_nothing_to_do_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    store = Store(tmp_path)
    store.create(run()).finish({})
    execute([run()], store, ONE)
    execute([], Store(tmp_path / "none"), ONE)
    assert not (tmp_path / "none").exists()


def test_processes(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    assert devices.processes_for("cpu", 1) == 8
    assert devices.processes_for("cpu", 3) == 2
    assert devices.processes_for("cpu", 16) == 1
    assert devices.processes_for("cpu", None) == 1
    assert devices.processes_for("cuda", 1) == 1


# --- workers that do not do what they should (a shell script in the place of Python) -------------------------------


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Put a shell script in the workers' place; it stands in ``tmp_path``."""

    def put(script: str) -> None:
        path = tmp_path / "worker"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\nread order\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def fault(tmp_path, specs=None) -> str:
    with pytest.raises(FaultError) as found:
        execute(specs or [run()], Store(tmp_path / "runs"), ONE)
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


def test_a_worker_that_crashes_has_its_last_words_told(worker, tmp_path):
    worker("for i in $(seq 2000); do echo line $i; done >&2\necho 'OSError: disk full' >&2\nexit 1")
    text = fault(tmp_path)
    assert "a training process failed: OSError: disk full (its last words are in " in text
    log = (tmp_path / "runs" / "last-fault.log").read_text()
    assert "line 2000\nOSError: disk full" in log
    assert len(log.splitlines()) < 50


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -9 $$", "it was ended by SIGKILL (out of memory?)"),
        ("kill -ABRT $$", "it was ended by SIGABRT"),
        ("exit 3", "exit code 3"),
        (
            "echo 'ValidationError: 1 error\n  a field\n    see there\n' >&2; exit 1",
            "failed: ValidationError: 1 error (its",
        ),
        ("exit 0", "a training process ended before its runs did; start again to go on"),
        ("echo not json", "a training process ended before its runs did"),
    ],
)
def test_a_worker_that_ends_in_silence(worker, tmp_path, script, says):
    worker(script)
    assert says in fault(tmp_path)


def test_a_worker_that_was_stopped_stops_all(worker, tmp_path):
    worker("exit 143")
    with pytest.raises(StoppedError):
        execute([run()], Store(tmp_path / "runs"), ONE)


def test_when_one_fails_the_others_are_asked_to_end(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 2)
    worker(
        "if mkdir first 2>/dev/null; then trap 'echo > ended; exit 143' TERM; echo > ready\n"
        "  while true; do sleep 0.05; done\nfi\n"
        "while [ ! -e ready ]; do sleep 0.05; done\necho 'no luck' >&2; exit 1"
    )
    assert "no luck" in fault(tmp_path, [run(), run(seed=1)])
    assert (tmp_path / "ended").exists()


# --- waiting for another process -----------------------------------------------------------------------------------


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # no worker is even started
    store, ticks = Store(tmp_path), []
    mine = store.create(run())
    with mine.lock():
        thread = threading.Thread(target=execute, args=([run()], store, ONE, ticks.append), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not ticks and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ticks[0].doing == "waiting for 1 run that another process is training"
        assert thread.is_alive()
        mine.finish({})
    thread.join(timeout=20)
    assert not thread.is_alive()


# --- the real thing ------------------------------------------------------------------------------------------------


def study(*sets, seeds=1):
    return reinit(Lab(resolve(sets=(*TINY, *sets), seeds=seeds, environment={}, folder=Path("/nonexistent"))))


@pytest.fixture
def one_worker(monkeypatch):
    """One process for each ``execute``: most of its time goes into imports."""
    monkeypatch.setattr(devices, "available_cores", lambda: 1)


def test_faults_of_single_runs(tmp_path, one_worker):
    """One run diverges, another's checkpoint is damaged: both are named, and the rest of the cohort is kept."""
    store = Store(tmp_path)
    planned = study("recipe.epochs=2", "recipe.copy.lr=1e30")
    scratch, reinitialised, copy = (arm.specs[0] for arm in planned.arms)
    (store.create(reinitialised).path / "checkpoint").write_bytes(b"not a checkpoint")
    with pytest.raises(FaultError) as found:
        execute(planned.specs, store, ONE)
    text = str(found.value)
    assert len(text.splitlines()) == 1
    assert f"run {reinitialised.id} stopped at step 0: {store.run(reinitialised).checkpoint} can't be read" in text
    assert f"'atdiag runs remove {reinitialised.id}'" in text
    step = store.run(copy).failure()["step"]
    assert 0 < step < 4
    assert f"run {copy.id} stopped at step {step}: the " in text
    assert text.endswith("(the other runs are kept; a smaller recipe.lr may help)")
    assert store.run(scratch).finished
    assert [store.run(s).state for s in (reinitialised, copy)] == ["failed", "failed"]
    assert not (tmp_path / "last-fault.log").exists()


def test_two_at_once_train_every_run_once(tmp_path, one_worker, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('what lies in the working folder is not ours')")
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")
    specs = study("recipe.epochs=1", seeds=1).specs
    faults = []

    def go():
        try:
            execute(specs, store, ONE)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not faults
    assert not pending(specs, store)
    for spec in specs:
        if spec.recipe.epochs:  # each training that ends an epoch opens an event file of its own
            assert len(list((store.run(spec).path / "tensorboard").iterdir())) == 1


COMMAND = [sys.executable, "-P", "-m", "atdiag.cli.app", "reinit", "--seeds", "1"]
LONGER = "recipe.epochs=8"


@contextlib.contextmanager
def one_core():
    """What is started in here gets one core, and so plans one worker."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, [min(cores)])
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def begin(folder: Path, specs) -> subprocess.Popen:
    """Start the command with one worker, and return when that has begun to train."""
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


def test_killed_then_terminated_then_run_to_the_end(tmp_path, one_worker):
    planned = study(LONGER)
    specs = [arm.specs[0] for arm in planned.arms]
    store = Store(tmp_path / "runs")

    main = begin(tmp_path, specs)
    main.kill()
    main.communicate()
    # Nobody tells the workers: they notice that their order's source is gone, write checkpoints and end.
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
