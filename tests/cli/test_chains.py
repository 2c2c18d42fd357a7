"""The output of one command as input of another, with files that the commands really wrote."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from atdiag.reports import writers
from tests.commands import SETS, atdiag, in_this_process, wrong

LOOK = ("--layers", "11", "--images", "40", "--train", "60", "--device", "cpu", "--json")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Run a tiny reinit and a tiny benchmark of two teachers that share a baseline; keep what each printed."""
    here = tmp_path_factory.mktemp("chains")
    lines = {
        "reinit": ["reinit", "--teacher", "deit_s", "--seeds", "2"],
        "benchmark": ["benchmark", "--teacher", "deit_s,dinov2_s", "--methods", "copy", "--seeds", "1"],
    }
    with contextlib.chdir(here), pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        patch.setattr(writers, "FIGURE_KINDS", ("png",))
        patch.setenv("ATDIAG_DATA", "")
        answers = {name: json.loads(atdiag(*line, *SETS, "--json").splitlines()[-1]) for name, line in lines.items()}
    return here, answers


@pytest.fixture
def at_home(home, monkeypatch, pictures):
    monkeypatch.chdir(home[0])
    return home[1]


def file_of(answer: dict) -> str:
    (file,) = (name for name in answer["files"] if name.endswith(".json"))
    return file


def probed(*arguments) -> dict:
    document = json.loads(atdiag("probe", *arguments, *LOOK).splitlines()[-1])
    names = [one["subject"] for one in document["subjects"]]
    assert names == list(dict.fromkeys(names)) == list(dict.fromkeys(pd.DataFrame(document["rows"]).subject))
    return {one["subject"]: [run["id"] for run in one["runs"]] for one in document["subjects"]}


def test_probe_takes_the_file_of_an_experiment(at_home):
    (study,) = at_home["reinit"]["studies"]
    expected = {arm["arm"]: arm["runs"] for arm in study["arms"]}
    assert len(expected) == 3 and all(len(runs) == 2 for runs in expected.values())
    expected["deit_s (mini) itself"] = study["reference"]["runs"]
    assert probed(file_of(at_home["reinit"])) == expected


@pytest.mark.slow
def test_probe_takes_the_file_of_several_studies(at_home):
    first, second = at_home["benchmark"]["studies"]
    assert first["arms"][0]["runs"] == second["arms"][0]["runs"]
    expected = {
        "scratch": first["arms"][0]["runs"],  # one condition of both
        "deit_s (mini): copy": first["arms"][1]["runs"],
        "dinov2_s (mini): copy": second["arms"][1]["runs"],
        "deit_s (mini) itself": first["reference"]["runs"],
        "dinov2_s (mini) itself": second["reference"]["runs"],
    }
    assert probed(file_of(at_home["benchmark"])) == expected


def test_every_way_to_name_a_run_is_a_subject(at_home):
    run = at_home["benchmark"]["studies"][0]["arms"][1]["runs"][0]
    weights = f"runs/{run}/weights.safetensors"
    out = atdiag("attention-stats", run[:8], weights, "--images", "4", "--device", "cpu", "--json")
    frame = pd.DataFrame(json.loads(out.splitlines()[-1])["rows"])
    half = len(frame) // 2
    by_id, by_file = frame[:half], frame[half:].reset_index(drop=True)
    pd.testing.assert_frame_equal(by_id, by_file)
    assert run[:6] in atdiag("maps", f"start:{run}", "--images", "1", "--device", "cpu")


def test_files_that_no_command_accepts_are_named(at_home, capsys):
    run = at_home["benchmark"]["studies"][0]["arms"][1]["runs"][0]
    atdiag("trace", run, "-o", "seen.safetensors", "--images", "2", "--device", "cpu")
    atdiag("runs", "export", "-o", "runs.csv")
    assert pd.read_csv("runs.csv").run.str.startswith(run[:6]).sum() == 1
    for name in ("seen.safetensors", "runs.csv"):
        assert name in wrong(capsys, "probe", name, *LOOK)
    Path("other.json").write_text(json.dumps({"studies": [{"arms": 1}]}))
    assert "other.json is not the JSON file of an experiment" in wrong(capsys, "probe", "other.json", *LOOK)


# --- a teacher of another package ----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """Make a package on the path that provides a teacher with seven classes by an entry point."""
    own = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32)
    own = {name: value.contiguous() for name, value in own.state_dict().items()}
    save_file(own, tmp_path / "mine.safetensors")
    facts = {"model": "vit_tiny_patch16_224", "file": str(tmp_path / "mine.safetensors"), "classes": 7}
    (tmp_path / "theirs.py").write_text(f"mine_s = {facts!r}\n")
    (info := tmp_path / "theirs-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[atdiag.teachers]\nmine_s = theirs:mine_s\n")

    def atdiag_there(*arguments):
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "atdiag", *arguments]
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return atdiag_there


@pytest.mark.slow
def test_a_teacher_of_another_package_is_listed_and_keeps_its_name_and_classes(package, tmp_path):
    for profile in ("mini", "paper"):
        listed = package("teachers", "--profile", profile)
        assert listed.returncode == 0, listed.stderr
        assert any(line.strip().startswith("mine_s") for line in listed.stdout.splitlines()), listed.stdout
    (row,) = json.loads(package("teachers", "--family", "mine_s", "--json").stdout.splitlines()[-1])
    assert (row["name"], row["classes"], row["available"]) == ("mine_s", 7, True)

    for name in "ab":
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / f"{name}.png")
    shown = package(
        *("attention-stats", "mine_s", "--images", "a.png", "--images", "b.png"), *("--device", "cpu", "--json")
    )
    assert shown.returncode == 0, shown.stderr
    assert {one["subject"] for one in json.loads(shown.stdout.splitlines()[-1])["rows"]} == {"mine_s"}


@pytest.mark.slow
def test_weights_must_have_the_declared_number_of_classes(package, tmp_path):
    (tmp_path / "theirs.py").write_text((tmp_path / "theirs.py").read_text().replace("'classes': 7", "'classes': 6"))
    Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "a.png")
    ended = package("attention-stats", "mine_s", "--images", "a.png", "--device", "cpu")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "head" in ended.stderr and "mine.safetensors" in ended.stderr
