"""The GPU benchmark at toy size on a CPU: each part, and the packing of runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from benchmarks.gpu import archive, record, study

PROJECT = Path(__file__).parents[2]


def toy(part, folder):
    """Run one part at toy size in a process without nnsight, as on the GPU machine; return its measurements."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "nnsight.py").write_text("raise ImportError('there is no nnsight on a GPU machine')\n")
    line = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--part", str(part), "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), str(PROJECT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / f"part{part}-toy.json").read_text())["measurements"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "skipped"),
    [
        (1, {"no synchronisation"}),
        (2, set()),
        (3, {"similarity"}),
        (4, {"out of memory", "tests with the mark cuda"}),
        (5, set()),
        (6, set()),
    ],
)
def test_each_part_completes_at_toy_size(part, skipped, tmp_path):
    found = toy(part, tmp_path)
    states = {name: entry["status"] for name, entry in found.items()}
    assert {name for name, state in states.items() if state == "skipped"} == skipped
    assert set(states.values()) <= {"measured", "skipped"}
    assert all("CUDA" in found[name]["reason"] or "nnsight" in found[name]["reason"] for name in skipped)


def fail():
    raise ValueError("as planned")


def skip():
    raise record.SkippedError("no such thing here")


def test_a_failure_is_recorded_and_the_next_measurement_taken(tmp_path):
    first = record.Record(tmp_path, 1, True, 60)
    first.measure("bad", fail)
    first.measure("away", skip)
    first.measure("good", lambda: {"value": 3})
    kept = json.loads(first.path.read_text())
    assert kept["machine"]["device"] == "cpu" and kept["machine"]["driver"] == record.driver()
    states = {name: entry["status"] for name, entry in kept["measurements"].items()}
    assert states == {"bad": "failed", "away": "skipped", "good": "measured"}
    assert "ValueError: as planned" in kept["measurements"]["bad"]["traceback"]
    assert first.failed == ["bad"]


def test_nothing_is_measured_twice(tmp_path):
    record.Record(tmp_path, 1, True, 60).measure("good", lambda: 1)
    again = record.Record(tmp_path, 1, True, 60)
    again.measure("good", fail)
    again.measure("bad", fail)
    again.measure("bad", lambda: 2)
    entries = json.loads(again.path.read_text())["measurements"]
    assert {name: entry["result"] for name, entry in entries.items()} == {"good": 1, "bad": 2}


def test_no_measurement_starts_after_the_deadline(tmp_path):
    late = record.Record(tmp_path, 1, True, 0)
    late.measure("one", fail)
    assert json.loads(late.path.read_text())["measurements"]["one"]["status"] == "not begun"
    record.Record(tmp_path, 1, True, 60).measure("one", lambda: 5)
    assert json.loads(late.path.read_text())["measurements"]["one"]["result"] == 5


def run_of(store, seed, finished, size=5000):
    network = Network(image_size=8, patch_size=4, width=8, depth=1, heads=1, classes=2)
    recipe = Recipe(epochs=1, batch_size=2)
    spec = RunSpec(network=network, data=Data(train=2), recipe=recipe, seed=Seed(data=seed, model=0))
    run = store.create(spec)
    content = np.random.default_rng(seed).bytes(size)
    run.write_metrics([{"epoch": 1}] * seed)
    if finished:
        run.write("predictions.npz", content)
        run.write("weights.safetensors", b"heavy" * 100_000)
        run.finish({"top1": float(seed)})
    else:
        run.write("checkpoint", content)
    return run


def test_packed_runs_are_restored_without_their_weights(tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    done = [run_of(here, seed, True) for seed in (1, 2, 3)]
    going = run_of(here, 4, False)
    assert archive.pack(here.root, tmp_path / "packed", piece=8000, files=9) == []
    files = list((tmp_path / "packed").iterdir())
    assert len(files) == 5 and all(path.stat().st_size <= 8000 for path in files)
    archive.restore(tmp_path / "packed", there.root)
    for run in done:
        other = there.run(run.spec)
        assert other.result() == run.result()
        other.sound(other.predictions)
        assert not other.weights.exists()
    other = there.run(going.spec)
    assert other.checkpoint.read_bytes() == going.checkpoint.read_bytes() and other.state == "interrupted"
    assert other.progress() == going.progress()


def test_a_checkpoint_that_does_not_fit_is_left_out_and_named(tmp_path):
    here = Store(tmp_path / "here")
    behind, ahead = run_of(here, 1, False, 20_000), run_of(here, 2, False, 20_000)
    left = archive.pack(here.root, tmp_path / "packed", piece=8000, files=5)
    assert len(left) == 1 and behind.id in left[0]
    assert sorted({path.name.split(".")[0] for path in (tmp_path / "packed").glob("*.checkpoint.*")}) == [ahead.id]
    assert archive.pack(here.root, tmp_path / "packed", total=10_000) != []
    assert not list((tmp_path / "packed").glob("*.checkpoint.*"))  # of the previous visit


def test_a_finished_run_is_not_replaced_and_a_started_one_is(tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    run_of(here, 1, True), run_of(there, 1, False)
    kept = run_of(there, 2, True)
    run_of(here, 2, False)
    archive.pack(here.root, tmp_path / "packed")
    archive.restore(tmp_path / "packed", there.root)
    assert all(run.finished for run in there.list())
    assert kept.result()["top1"] == 2 and not kept.checkpoint.exists()


def test_a_missing_piece_is_named(tmp_path):
    here = Store(tmp_path / "here")
    going = run_of(here, 1, False, 20_000)
    archive.pack(here.root, tmp_path / "packed", piece=8000)
    (tmp_path / "packed" / f"{going.id}.checkpoint.1of3").unlink()
    with pytest.raises(ValueError, match=r"lacks pieces \[1\] of 3"):
        archive.restore(tmp_path / "packed", tmp_path / "there")


def test_missing_real_data_is_a_reason_to_skip(tmp_path, monkeypatch):
    monkeypatch.setenv("ATDIAG_TEST_DATA", str(tmp_path))
    with pytest.raises(record.SkippedError, match="lacks vit_tiny"):
        study.test_data()
    monkeypatch.delenv("ATDIAG_TEST_DATA")
    with pytest.raises(record.SkippedError, match="names no folder"):
        study.test_data()
