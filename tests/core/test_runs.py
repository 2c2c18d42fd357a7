import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from atdiag.core.errors import UserError
from atdiag.core.runs import Run, RunBusyError, Store, write_atomically
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed

NETWORK = Network(image_size=20, patch_size=4, channels=1, width=16, depth=3, heads=2, classes=10)


def spec(seed: int = 0) -> RunSpec:
    return RunSpec(network=NETWORK, data=Data(train=64), recipe=Recipe(epochs=1), seed=Seed(data=seed, model=seed))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@contextlib.contextmanager
def holder(run: Run):
    """Start another process that holds a run's lock until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from atdiag.core.runs import Run\n"
        "with Run(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().strip() == "held"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_written_file_can_be_read(tmp_path):
    write_atomically(tmp_path / "file", "größe")
    write_atomically(tmp_path / "file", b"\x00\x01")
    assert (tmp_path / "file").read_bytes() == b"\x00\x01"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_fault_while_writing_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, moment, fault):
    def strike(*_):
        raise fault

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, moment, strike)
    with pytest.raises(type(fault)):
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, call=call, real=real: (calls.append(call), real(*a)))
    write_atomically(tmp_path / "file", "content")
    assert calls == ["fsync", "replace"]


def test_the_next_lock_removes_half_written_files_of_a_killed_process(store):
    run = store.create(spec())
    for litter in (".checkpoint-a1b2c3d4", ".result.json-a1b2c3d4"):
        (run.path / litter).write_text("half")
    (run.path / ".spec.json-a1b2c3d4").write_text("another process may be writing this")
    with run.lock():
        assert {p.name for p in run.path.iterdir()} == {"spec.json", "lock", ".spec.json-a1b2c3d4"}


# --- States -----------------------------------------------------------------------------------------------------------


def test_a_run_is_finished_if_and_only_if_its_result_is_there(store):
    run = store.create(spec())
    assert (run.state, run.finished) == ("new", False)
    run.write("checkpoint", b"state")
    assert run.state == "interrupted"
    run.fail(7, "the loss became nan")
    assert (run.state, run.failure()) == ("failed", {"step": 7, "cause": "the loss became nan"})
    with run.lock():
        assert run.state == "training"
    for name in ("weights.safetensors", "predictions.npz", "metrics.jsonl"):
        run.write(name, b"")
        assert not run.finished
    with pytest.raises(FileNotFoundError):
        run.result()
    run.finish({"top1": 50.0})
    assert (run.state, run.finished) == ("finished", True)
    assert run.result() == {"id": run.id, "top1": 50.0, "files": run.hashes()}
    for name in ("spec.json", "weights.safetensors", "predictions.npz", "metrics.jsonl"):
        assert run.hashes()[name] == hashlib.sha256((run.path / name).read_bytes()).hexdigest()
    assert not run.checkpoint.exists()
    assert run.failure() is None


def test_a_fault_while_finishing_leaves_an_unfinished_run_with_its_checkpoint(store, monkeypatch):
    run = store.create(spec())
    run.write("checkpoint", b"state")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        run.finish({"top1": 50.0})
    assert (run.state, run.checkpoint.read_bytes()) == ("interrupted", b"state")


def test_metrics(store):
    run = store.create(spec())
    assert run.progress() == []
    lines = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.5}]
    run.write_metrics(lines)
    assert run.progress() == lines
    run.write_metrics(lines[:1])
    assert run.progress() == lines[:1]


# --- Locks ------------------------------------------------------------------------------------------------------------


def test_a_run_held_by_another_process_is_busy_and_free_again_when_that_is_killed(store):
    run = store.create(spec())
    with holder(run) as process:
        assert run.state == "training"
        with pytest.raises(RunBusyError, match=run.id), run.lock():
            pass
        with pytest.raises(RunBusyError):
            store.remove(run)
        assert run.path.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.state == "new"
        with run.lock():
            assert run.state == "training"
    assert run.state == "new"


def test_a_run_held_by_this_process_is_busy_too(store):
    run = store.create(spec())
    with run.lock(), pytest.raises(RunBusyError), Run(run.path).lock():
        pass
    with pytest.raises(ZeroDivisionError), run.lock():
        _ = 1 / 0
    with run.lock():
        pass


def test_asking_for_the_state_does_not_make_a_run_busy(store):
    # The state is determined by trying the lock, which holds it for a moment.
    run = store.create(spec())
    lock = FileLock(run.path / "lock", thread_local=False)
    lock.acquire()
    asked = threading.Timer(0.01, lock.release)
    asked.start()
    with run.lock():
        assert run.state == "training"
    asked.join()


# --- Specs and the store ----------------------------------------------------------------------------------------------


def test_a_runs_spec_is_read_back(store):
    run = store.create(spec())
    assert Run(run.path).spec == spec()
    before = (run.path / "spec.json").stat().st_mtime_ns
    assert store.create(spec()) == run
    assert (run.path / "spec.json").stat().st_mtime_ns == before


def edited(text: str) -> str:
    document = json.loads(text)
    document["recipe"]["lr"] = 0.5
    return json.dumps(document)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(edited, "describes run"), (lambda text: text[:-20], "Invalid JSON"), (lambda _: "{}", "Field required")],
)
def test_a_spec_of_another_run_is_detected(store, spoil, message):
    path = store.create(spec()).path
    (path / "spec.json").write_text(spoil((path / "spec.json").read_text()))
    for use in (lambda: Run(path).spec, lambda: store.create(spec())):
        with pytest.raises(ValueError, match=message):
            use()


def test_list_is_oldest_first_and_skips_other_folders(store):
    assert store.list() == []
    runs = [store.create(spec(seed)) for seed in range(4)]
    for age, run in enumerate(runs):
        os.utime(run.path / "spec.json", (age, age))
    (store.root / "notes").mkdir()
    (store.root / "file").write_text("")
    assert [run.id for run in store.list()] == [run.id for run in runs]


def test_find(store):
    for run in [store.create(spec(seed)) for seed in range(5)]:
        assert store.find(run.id) == store.find(run.id[:8]) == run
    for name in ("abcd000000000000", "abcd111111111111"):
        (store.root / name).mkdir()
        (store.root / name / "spec.json").write_text("{}")
    with pytest.raises(UserError, match=r"2 runs in .* begin with 'abcd': abcd000000000000, abcd111111111111"):
        store.find("abcd")
    with pytest.raises(UserError, match="no run"):
        store.find("xxxx")
    with pytest.raises(UserError, match="at least 4"):  # "" would be any run, and 'remove' would delete it
        store.find("")


def test_remove(store):
    run, other = store.create(spec(0)), store.create(spec(1))
    run.finish({"top1": 1.0})
    (run.path / "tensorboard").mkdir()
    (run.path / "tensorboard" / "events").write_text("")
    store.remove(run)
    assert not run.path.exists()
    assert store.list() == [other]


def test_an_interrupted_removal_leaves_no_run_that_passes_for_finished(store, monkeypatch):
    run = store.create(spec())
    run.finish({"top1": 1.0})
    monkeypatch.setattr("shutil.rmtree", lambda path: Path(path, "spec.json").unlink())
    store.remove(run)
    assert not run.finished
