"""The commands probe, attention-stats and maps: right and wrong input, and the contents of their files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from atdiag.analysis import subjects
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Recipe, RunSpec, Seed, Transfer
from atdiag.networks.model import students
from atdiag.training import cohort
from tests.commands import atdiag, wrong

DATA = Data(name="digits", train=64, test_per_source=1, clutter=6)


pytestmark = pytest.mark.usefixtures("at_tmp_path")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Make tiny runs of two arms with two seeds each, and the JSON file of their experiment."""
    folder = tmp_path_factory.mktemp("probes")
    store = Store(folder / "runs")
    teacher = subjects.teachers.teacher("deit_s", "mini")
    common = {"network": teacher.network.student(), "data": DATA, "recipe": Recipe(epochs=1, batch_size=32)}
    arms = {"scratch": {}, "copy": {"teacher": teacher, "transfer": Transfer(method="copy", layers=tuple(range(12)))}}
    specs = {
        name: [RunSpec(**common, **own, seed=Seed(data=seed, model=seed)) for seed in (0, 1)]
        for name, own in arms.items()
    }
    for seed in (0, 1):
        of_seed = [runs[seed] for runs in specs.values()]
        ended = cohort.train(of_seed, store, subjects.loading.load, ExecutionOptions(device="cpu"))
        assert set(ended.values()) == {"finished"}
    rows = [{"arm": name, "runs": [spec.id for spec in runs]} for name, runs in specs.items()]
    file = folder / "report.json"
    study = {"study": teacher.label, "teacher": teacher.label, "arms": rows, "reference": None}
    file.write_text(json.dumps({"ablation": "x", "studies": [study]}))
    return file, store, specs


def check(out, command) -> dict:
    """Return the last line, after checking that the files it names exist and no line is wider than a terminal."""
    document = json.loads(out.splitlines()[-1])
    assert document["command"] == command
    for name in document["files"]:
        head = Path(name).read_bytes()[:8]
        assert head[:4] == {"png": b"\x89PNG", "pdf": b"%PDF"}.get(name[-3:], head[:4]) and head
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("  results", "{")))
    return document


def test_probe_of_two_teachers():
    out = atdiag(
        *("probe", "deit_s", "siglip2_b", "--layers", "0,11", "--images", "60", "--train", "120"),
        *("--device", "cpu", "--json"),
    )
    document = check(out, "probe")
    frame = pd.read_csv(next(name for name in document["files"] if name.endswith("csv")))
    assert (document["train"], document["images"], document["neighbours"]) == (120, 60, 20)
    assert len(frame) == len(document["rows"]) == 2 * (9 + 1) + 1 + 2 * (3 + 1) + 1
    last = frame[(frame.layer == 11) & (frame.probe == "head")].set_index("subject").top1
    itself = frame[frame.probe == "itself"].set_index("subject").top1
    assert last.to_dict() == itself.to_dict() and last.min() > 50
    for word in ("deit_s (mini)", "siglip2_b (mini)", "early exit", "120 training images", "60 test images"):
        assert word in out
    held_out = document["regularisation"]["held_out"]
    assert 24 <= held_out < 40 and document["regularisation"]["stratified"] and not document["regularisation"]["fixed"]
    assert f"regularisation chosen on {held_out} of them, each class in proportion" in " ".join(out.split())


@pytest.mark.slow
def test_probe_of_an_experiment_aggregates_arms_over_seeds(report):
    file, store, specs = report
    out = atdiag(
        *("probe", file, "deit_s", "--runs", store.root, "--layers", "11", "--images", "50", "--train", "100"),
        *("--device", "cpu", "--json"),
    )
    document = check(out, "probe")
    assert [one["subject"] for one in document["subjects"]] == ["scratch", "copy", "deit_s (mini)"]
    assert [run["id"] for run in document["subjects"][1]["runs"]] == [spec.id for spec in specs["copy"]]
    rows = pd.DataFrame(document["rows"])
    assert rows.groupby("subject").seeds.max().to_dict() == {"scratch": 2, "copy": 2, "deit_s (mini)": 1}
    assert set(rows[rows.subject == "copy"].interval_covers) == {"seeds and images"}


def test_attention_stats_of_a_teacher_and_its_student(report):
    _, store, specs = report
    out = atdiag(
        *("attention-stats", "deit_s", specs["copy"][0].id[:8], "--runs", store.root, "--images", "12"),
        *("--device", "cpu", "--json"),
    )
    document = check(out, "attention-stats")
    frame = pd.DataFrame(document["rows"])
    teacher, student = (frame[frame.subject == name] for name in frame.subject.unique())
    assert len(teacher) == len(student) == 12 * 2
    # The student uses its teacher's maps, but its residual stream is its own.
    for name in ("entropy", "distance", "sink", "rank"):
        np.testing.assert_allclose(teacher[name], student[name], rtol=1e-4)
    assert not np.allclose(teacher["norm"], student["norm"], rtol=0.01)


def test_maps_of_subjects_of_many_kinds(report):
    _, store, specs = report
    out = atdiag(
        *("maps", "deit_s", "dinov2_reg_s", specs["copy"][0].id, "--runs", store.root, "--images", "0,7"),
        *("--layers", "0,11", "--query", "centre", "--query", "4,4", "--device", "cpu", "--json"),
    )
    document = check(out, "maps")
    assert len(document["rows"]) == 3 * 2 * 2 * 2 and document["images"] == ["digits 0", "digits 7"]
    assert sum(name.endswith("png") for name in document["files"]) == 4


def test_a_run_can_be_shown_at_initialisation(report):
    _, store, specs = report
    spec = specs["copy"][1]
    start = subjects.find(f"start:{spec.id[:6]}", store=store)
    fresh = students.build(spec.network, 1).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in start.module.state_dict().items())
    assert start.label == f"{spec.id[:6]} at its start" and start.transfer.method == "none"
    atdiag("maps", f"start:{spec.id}", spec.id, "deit_s", "--runs", store.root, "--device", "cpu")


def test_maps_of_image_files_by_head(tmp_path):
    draw = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(draw.integers(0, 255, (30, 40), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    out = atdiag(
        *("maps", "deit_s", "--images", tmp_path, "--skip-bad", "--head", "all", "--query", "cls", "--no-rollout"),
        *("--device", "cpu", "--json"),
    )
    assert "1 of 3 images can't be read" in out
    document = check(out, "maps")
    assert document["heads"] == ["0", "1"] and len(document["images"]) == 2


def test_wrong_input_is_one_line(capsys, tmp_path):
    (tmp_path / "c.png").write_bytes(b"no picture")
    (tmp_path / "odd.json").write_text("[]")
    cpu = ("--device", "cpu")
    for fault, arguments in {
        "did you mean 'clip_b'": ("probe", "clip_n"),
        "deit_x": ("maps", "deit_s", "deit_x"),
        "no run": ("maps", "start:12ab34"),
        "12 is out of range": ("probe", "deit_s", "--layers", "12"),
        "head 2 is out of range": ("maps", "deit_s", "--head", "2"),
        "did you mean 'centre'": ("maps", "deit_s", "--query", "center"),
        "has no class token": ("maps", "siglip2_b", "--query", "cls"),
        "give mean, all, or a number": ("maps", "deit_s", "--head", "most"),
        "c.png": ("maps", "deit_s", "--images", tmp_path / "c.png"),
        "classes of these images are not known": ("probe", "deit_s", "--images", tmp_path / "c.png"),
        "is not the JSON file of an experiment": ("probe", tmp_path / "odd.json"),
        "there is no file": ("probe", tmp_path / "none.json"),
        "--train 0": ("probe", "deit_s", "--train", "0", "--images", "5"),
        "--neighbours 90 is out of range": (
            "probe",
            "deit_s",
            "--train",
            "60",
            "--images",
            "5",
            "--neighbours",
            "90",
        ),
        "101 images are 101 figures: give at most 100": ("maps", "deit_x", "--images", "0-100"),
        "results/": ("probe", "none.json"),
        "holds no network": ("attention-stats", tmp_path / "odd.json"),
        "positive numbers": ("attention-stats", "deit_s", "--rank-images", "0"),
    }.items():
        assert fault in wrong(capsys, *arguments, *cpu), arguments
    assert not (tmp_path / "results").exists()


def test_a_fixed_regularisation_is_reported():
    from atdiag.api.probed import regularised

    assert regularised(0).startswith("regularisation fixed (C = 1, scikit-learn's default): a class with a single")
    assert regularised(30) == "regularisation chosen on 30 of them, each class in proportion"
