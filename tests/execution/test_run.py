"""Every run is trained exactly once, whatever else happens."""

import sys
import threading
import time

import pytest

from atdiag.core.errors import FaultError
from atdiag.core.runs import Store
from atdiag.execution.plan import pending
from atdiag.execution.run import execute
from tests.execution.specs import ONE, run, study


def test_nothing_to_do_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    store = Store(tmp_path)
    store.create(run()).finish({})
    execute([run()], store, ONE)
    execute([], Store(tmp_path / "none"), ONE)
    assert not (tmp_path / "none").exists()


def test_execute_waits_for_a_run_that_another_process_trains(tmp_path, monkeypatch):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_concurrent_commands_train_every_run_once(tmp_path, one_worker, monkeypatch):
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
        if spec.recipe.epochs:  # each process that completes an epoch opens its own event file
            assert len(list((store.run(spec).path / "tensorboard").iterdir())) == 1
