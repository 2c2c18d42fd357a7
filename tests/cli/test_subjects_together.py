"""A run among the subjects sets data and image size; subjects are labelled as typed."""

import json

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed
from atdiag.data.sources import complete
from atdiag.training import cohort
from tests.commands import atdiag, wrong

CPU = ("--device", "cpu", "--images", "0,1,2")


pytestmark = pytest.mark.usefixtures("at_tmp_path", "pictures")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a timm teacher for 160 px, and students of 96 and 64 px trained on a folder of photographs."""
    root = tmp_path_factory.mktemp("together")
    draw = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for name in ("ant", "bee"):
            (root / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 255, (100, 120, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / part / name / f"{i}.png")
    teacher = timm.create_model("test_vit")
    save_file(teacher.state_dict(), root / "t.safetensors")
    store = Store(root / "runs")
    specs = []
    for size in (96, 64):
        network = Network(image_size=size, patch_size=16, channels=3, width=64, depth=6, heads=2, classes=2)
        data = complete(Data(name=f"folder:{root / 'photos'}", train=12, image_size=size))
        specs.append(
            RunSpec(network=network, data=data, recipe=Recipe(epochs=1, batch_size=6), seed=Seed(data=0, model=0))
        )
    for spec in specs:
        ended = cohort.train([spec], store, lambda teacher: None, ExecutionOptions(device="cpu"))
        assert ended == {spec.id: "finished"}
    return f"timm:test_vit@{root / 't.safetensors'}", *(spec.id for spec in specs), ("--runs", store.root)


@pytest.mark.parametrize("order", [1, -1], ids=["teacher first", "run first"])
def test_maps_have_the_grid_of_the_run(runs, order, monkeypatch):
    from atdiag.analysis import maps

    teacher, run, _, where = runs
    grids = []
    shown = maps.maps
    monkeypatch.setattr(maps, "maps", lambda *a: grids.append((found := shown(*a)).attention.shape[-2:]) or found)
    out = atdiag("maps", *[teacher, run][::order], *where, "--device", "cpu", "--images", "0", "--json")
    assert grids == [(6, 6), (6, 6)]
    assert json.loads(out.splitlines()[-1])["images"][0].endswith("photos 0")


def test_every_command_uses_the_runs_images(runs):
    teacher, run, _, where = runs
    for command in (
        ("similarity", run, teacher),
        ("attention-stats", teacher, run),
        ("probe", teacher, run, "--train", "12", "--neighbours", "3"),
        ("intervene", run, "--from", teacher),
    ):
        out = atdiag(*command, *where, *CPU, "--json")
        assert "photos" in out, command
        assert not json.loads(out.splitlines()[-1])["missing"]


def test_a_typed_size_is_kept_even_if_sizes_then_differ(runs, capsys):
    teacher, run, _, where = runs
    own = ("--data", f"folder:{where[1].parent / 'photos'}", "--set", "data.image_size=128")
    said = wrong(capsys, "similarity", teacher, run, *where, *CPU, *own)
    assert "their maps can't be laid over each other" in said


@pytest.mark.parametrize("command", ["maps", "similarity", "attention-stats", "probe"])
def test_runs_of_different_sizes_are_both_named(runs, capsys, tmp_path, command):
    teacher, run, other, where = runs
    said = wrong(capsys, command, teacher, run, other, *where)
    assert f"{run[:6]} scratch sees images of 96 px and {other[:6]} scratch sees images of 64 px" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_subjects_are_labelled_as_typed(runs, capsys):
    teacher, run, _, where = runs
    typed = ("--label", "the teacher", "--label", "a student of which much can be said")
    for command in ("attention-stats", "maps", "probe", "similarity"):
        more = ("--train", "12", "--neighbours", "3") if command == "probe" else ()
        out = atdiag(command, teacher, run, *where, *CPU, *typed, *more, "--json")
        document = json.loads(out.splitlines()[-1])
        names = [one.get("label") or one["subject"] for one in document["subjects"]]
        assert names == ["the teacher", "a student of which much can be said"]
        frame = pd.read_csv(next(path for path in document["files"] if path.endswith(".csv")))
        column = next(name for name in ("subject", "b") if name in frame)
        assert names[1] in set(frame[column])
    capsys.readouterr()
    for labels in (typed[:2], ("--label", "a", "--label", "a"), ("--label", "a", "--label", " ")):
        said = wrong(capsys, "maps", teacher, run, *where, *labels)
        assert "there are 2 subjects: give each a name of its own" in said
