"""The behaviour described in docs/faults.md: nothing half-written, nothing lost before the last checkpoint."""

import errno
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from atdiag.core import errors
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data.decoding import BrokenImageError
from atdiag.data.loader import WorkerDiedError
from atdiag.data.sources import complete
from atdiag.execution import run
from atdiag.training import checkpoint, cohort
from tests.photos import draw

ROOT = Path(__file__).parents[2]


def at(step, do):
    """Make a ``should_stop`` that never stops, but does something after a step."""
    done = iter(range(1, 10**6))

    def ask():
        if next(done) == step:
            do()
        return False

    return ask


def litter(run):
    return [path.name for path in run.path.glob(".*")]


# --- The disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Redirect all writes from now on to /dev/full, where the kernel reports that no space is left."""

    def mkstemp(dir, prefix):
        path = Path(dir) / f"{prefix}full"
        path.touch()
        return os.open("/dev/full", os.O_WRONLY), str(path)

    return lambda: monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("step", [3, 10])  # in the middle; just before weights, predictions and result are written
def test_a_full_disk(bench, alone, assert_same, full_disk, monkeypatch, step):
    specs = [bench.company()[name] for name in ("baseline", "copy")]
    with pytest.raises(OSError, match="No space left") as found:
        bench.train(*specs, should_stop=at(step - 1, full_disk), checkpoint_seconds=0)
    assert found.value.errno == errno.ENOSPC
    monkeypatch.undo()
    for spec in specs:
        run = bench.run(spec)
        assert not run.finished
        assert litter(run) == []
        assert run.state in ("interrupted", "new")
        if run.checkpoint.exists():
            assert 0 < checkpoint.load(run).step <= step, "the last whole one"
    assert set(bench.train(*specs).values()) == {"finished"}
    for spec in specs:
        assert_same(alone, bench, spec)


@pytest.mark.slow
def test_a_full_disk_in_a_worker_process(tmp_path, monkeypatch):
    """The operating system refuses the worker files beyond 50 kB: the message, and the same command afterwards."""
    places = tmp_path / "site"
    places.mkdir()
    (places / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "if any('worker' in word for word in sys.orig_argv):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    )
    network = Network(image_size=20, patch_size=4, channels=1, width=48, depth=3, heads=2, classes=10)
    data, recipe = Data(train=32, test_per_source=1), Recipe(epochs=1, batch_size=16)
    spec = RunSpec(network=network, data=data, recipe=recipe, seed=Seed(data=0, model=0))
    store = Store(tmp_path / "runs")
    with monkeypatch.context() as patch, pytest.raises(errors.FaultError) as found:
        patch.setenv("PYTHONPATH", f"{places}{os.pathsep}{ROOT}")
        run.execute([spec], store, ExecutionOptions(device="cpu", threads=1))
    says = rf"a training process failed: OSError: \[Errno {errno.EFBIG}\] File too large \(its last output is in .*\)"
    assert re.match(says + "; the same command goes on from there$", str(found.value))
    mine = store.run(spec)
    assert not mine.finished
    assert not mine.weights.exists()
    assert litter(mine) == []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run.execute([spec], store, ExecutionOptions(device="cpu", threads=1))
    assert mine.finished
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_error_is_reported_even_if_it_can_not_be_logged(tmp_path, monkeypatch):
    script = tmp_path / "worker"
    script.write_text(f"#!/bin/sh\nread order\nrm -r {tmp_path}/runs\necho 'OSError: the mount is gone' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    network = Network(image_size=20, patch_size=4, channels=1, width=16, depth=3, heads=2, classes=10)
    spec = RunSpec(network=network, data=Data(train=64), recipe=Recipe(epochs=1), seed=Seed(data=0, model=0))
    with pytest.raises(errors.FaultError) as found:
        run.execute([spec], Store(tmp_path / "runs"), ExecutionOptions(device="cpu", threads=1))
    assert "a training process failed: OSError: the mount is gone; the same command" in str(found.value)


def test_the_folder_of_runs_disappears_and_returns(bench, alone, assert_same):
    spec = bench.company()["copy"]
    away = bench.store.root.with_name("away")
    with pytest.raises(FileNotFoundError):
        bench.train(spec, should_stop=at(6, lambda: bench.store.root.rename(away)), checkpoint_seconds=0)
    if bench.store.root.exists():  # anything created there in between is no run
        assert not list(bench.store.root.glob("*/result.json"))
        shutil.rmtree(bench.store.root)
    away.rename(bench.store.root)
    assert bench.run(spec).state == "interrupted"
    assert bench.train(spec) == {spec.id: "finished"}
    assert_same(alone, bench, spec)


# --- Images and the processes that load them --------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Make a spec on a folder of JPEGs of several sizes, which are decoded when needed."""
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    draw(root, train=12)
    network = Network(image_size=20, patch_size=4, channels=3, width=16, depth=2, heads=2, classes=2)
    data = complete(Data(name=f"folder:{root}", train=24, image_size=20))
    recipe = Recipe(epochs=3, batch_size=8, flip=True, crop=0.3)
    return root, RunSpec(network=network, data=data, recipe=recipe, seed=Seed(data=0, model=0))


def damaged(root):
    path = root / "train" / "bee" / "7.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(len(content) - 200))  # its size is unchanged
    return path, lambda: path.write_bytes(content)


def gone(root):
    away = root.with_name("unmounted")
    root.rename(away)
    return root, lambda: away.rename(root)


@pytest.mark.parametrize("how", [damaged, gone])
def test_images_become_unreadable_during_a_run(bench, photos, assert_same, how, tmp_path):
    root, spec = photos
    whole = bench.sibling(tmp_path / "whole")
    whole.train(spec)
    mend = []

    def spoil():
        mend.append(how(root))

    with pytest.raises(BrokenImageError, match=f"the image {root}.* can't be read") as found:
        bench.train(spec, should_stop=at(2, spoil))
    path, restore = mend[0]
    assert str(path) in str(found.value)
    assert bench.run(spec).state == "interrupted"
    assert checkpoint.load(bench.run(spec)).step >= 2, "what was learnt before is kept, though no checkpoint was due"
    restore()
    assert bench.train(spec) == {spec.id: "finished"}
    assert_same(whole, bench, spec)


def children():
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="children are not listed here")
def test_a_loader_process_dies_during_a_run(bench, photos, assert_same, monkeypatch, tmp_path):
    _, spec = photos
    spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"epochs": 40})})
    whole = bench.sibling(tmp_path / "whole")
    whole.train(spec)
    before = set(children())
    with monkeypatch.context() as patch:
        patch.setattr(cohort, "default_workers", lambda *_: 2)

        def kill():
            for pid in set(children()) - before:
                if b"multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_bytes():  # torch's resource tracker
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

        with pytest.raises(WorkerDiedError, match=r"a process that loads images died.*the same command goes on"):
            bench.train(spec, should_stop=at(3, kill), checkpoint_seconds=0)
    assert bench.run(spec).state == "interrupted"
    assert bench.train(spec) == {spec.id: "finished"}
    assert_same(whole, bench, spec)
