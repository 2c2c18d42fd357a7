"""Options that name folders and devices: what they affect, and that this ends with the command."""

import json
import os
from types import SimpleNamespace

import pytest

from atdiag.cli import experiments
from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from tests.commands import LINES, SETS, ran, wrong


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_plan_can_name_an_absent_device(folder, no_cuda):
    code, out = ran("reinit", "--device", "cuda", "--dry-run", "--seeds", "1", *SETS)
    assert code == 0
    assert "GPU-hours" in out
    assert list(folder.iterdir()) == []


def test_an_absent_device_is_reported_before_anything_is_trained(folder, no_cuda, capsys):
    assert "cuda" in wrong(capsys, "reinit", "--device", "cuda", "--seeds", "1", *SETS)
    assert list(folder.iterdir()) == []


def test_an_absent_device_is_refused_even_if_all_runs_are_finished(no_cuda):
    """Before the header is printed: what is finished may still have to be measured."""
    finished = SimpleNamespace(todo=(), device="cuda")
    with pytest.raises(UserError, match="leave `device` out"):
        experiments.check([], finished, SimpleNamespace(on_cluster=False))


def found(*options) -> str | None:
    """Return where a command finds imagenette."""
    rows = json.loads(ran("data", *options, "--json")[1])
    return next(row for row in rows if row["name"] == "imagenette")["folder"]


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_data_dir_affects_only_its_own_command(folder, tmp_path, monkeypatch, given):
    for name in ("mine", "elsewhere"):
        for split in ("train", "val"):
            (tmp_path / name / "imagenette" / split).mkdir(parents=True)
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path / given) if given else "")
    environment, before = dict(os.environ), found()
    assert found("--data-dir", tmp_path / "mine") == str(tmp_path / "mine" / "imagenette")
    code, _ = ran("reinit", "--data-dir", tmp_path / "mine", "--dry-run", "--seeds", "1", *SETS)
    assert code == 0
    assert found() == before == (str(tmp_path / given / "imagenette") if given else None)
    assert paths.data_dir() == (tmp_path / given if given else None)
    assert dict(os.environ) == environment


def test_runs_finished_in_a_store_nearby_are_mentioned_before_they_are_trained_again(folder, monkeypatch):
    words = [*LINES["layers"], *SETS, "--seeds", "1", "--dry-run"]
    code, out = ran(*words, "--json")
    assert code == 0 and "takes them" not in out
    one = RunSpec.model_validate(json.loads(out.splitlines()[-1])["runs"][0]["spec"])
    Store(folder / "runs").create(one).finish({"top1": 1.0})
    inside = folder / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert "1 run of these is finished in ../runs: --runs ../runs takes them" in ran(*words)[1]
    assert "takes them" not in ran(*words, "--runs", "../runs")[1]


def test_the_settings_of_a_folder_above_count_and_are_said(folder, monkeypatch):
    (folder / "atdiag.toml").write_text('runs = "kept"\nseeds = 1\n')
    inside = folder / "one" / "two"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    out = ran(*LINES["layers"], *SETS, "--dry-run")[1]
    assert "settings of ../../atdiag.toml" in out and ", 1 seed" in out
    assert ran("runs", "list")[1] == "0 runs in ../../kept\n"
    (inside / "atdiag.toml").write_text("seeds = 2\n")  # the nearest alone
    out = ran(*LINES["layers"], *SETS, "--dry-run")[1]
    assert "settings of" not in out and ", 2 seeds" in out
    assert ran("runs", "list")[1] == "0 runs in runs\n"
