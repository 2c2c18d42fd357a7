"""A run's provenance: recorded in its result, and no part of its id."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from atdiag.core.runs import file_sha256
from atdiag.core.spec import Data, Recipe
from atdiag.data import folder_sets, manifest, sources
from atdiag.training import provenance

CPU = torch.device("cpu")


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    provenance.git_state.cache_clear()
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("one")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_the_commit_and_whether_tracked_files_were_changed(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").write_text("a result, say")
    assert provenance.git_state(checkout) == {"commit": commit, "dirty": False}
    provenance.git_state.cache_clear()
    (checkout / "file").write_text("two")
    assert provenance.git_state(checkout) == {"commit": commit, "dirty": True}


def test_a_repository_named_by_a_git_hook_is_ignored(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert provenance.git_state(checkout) is not None


def test_without_git_or_checkout_nothing_fails(checkout, tmp_path, monkeypatch):
    assert provenance.git_state(tmp_path) is None, "no checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(checkout) is None, "no git"
    provenance.git_state.cache_clear()
    (tmp_path / "git").write_text("#!/bin/sh\necho 'detected dubious ownership' >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    assert provenance.git_state(checkout) is None, "git refuses"


def test_a_run_records_its_provenance_and_file_hashes(bench, monkeypatch):
    monkeypatch.setattr(provenance, "git_state", lambda: {"commit": "c0ffee", "dirty": True})
    spec = bench.spec(recipe=Recipe(epochs=1, batch_size=16))
    left = iter([False])
    bench.train(spec, should_stop=lambda: next(left, True))  # stopped after two steps
    monkeypatch.setattr(provenance, "git_state", lambda: {"commit": "beef", "dirty": False})
    bench.train(spec, command=["atdiag", "reinit", "--module", "attn"])
    run = bench.run(spec)
    origin = run.result()["origin"]
    assert origin["command"] == ["atdiag", "reinit", "--module", "attn"]
    assert origin["git"] == {"commit": "beef", "dirty": False}
    assert origin["from_step"] == 2
    assert origin["data_manifest"] is None
    assert origin["hardware"]["cpu"]
    assert origin["hardware"]["cores"] >= 1
    assert origin["started_at"] <= run.result()["environment"]["finished_at"]
    files = run.result()["files"]
    assert set(files) == {"spec.json", "metrics.jsonl", "weights.safetensors", "predictions.npz"}
    assert files == {name: file_sha256(run.path / name) for name in files}
    json.dumps(run.result(), allow_nan=False)


def test_used_as_a_library_it_records_this_processs_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--fast"])
    assert provenance.origin(Data(train=10), CPU)["command"] == ["notebook.py", "--fast"]


def test_the_data_manifest_is_recorded_only_while_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "own"
    for split in ("train", "val"):
        for cls in ("ant", "bee"):
            (root / split / cls).mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(split), len(cls), 0)).save(root / split / cls / "one.png")
    data = Data(name=f"folder:{root}", train=2, image_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(folder_sets.FolderSet, "files", lambda self: pytest.fail("a million files looked at for nothing"))
        assert provenance.origin(data, CPU)["data_manifest"] is None
    reading = manifest.read(sources.find(data.name).files(), processes=1)
    assert provenance.origin(data, CPU)["data_manifest"] == reading.sha256
    Image.new("RGB", (8, 8)).save(root / "train" / "ant" / "two.png")
    assert provenance.origin(data, CPU)["data_manifest"] is None, "it is another data set now"
