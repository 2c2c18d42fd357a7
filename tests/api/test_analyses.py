"""The analyses in Python: the numbers of their commands, for names and for networks of the user's."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

import atdiag
from atdiag.core.errors import UserError
from tests.commands import ran


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("ATDIAG_PROFILE", "ATDIAG_RUNS", "ATDIAG_DATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def tiny(**changed):
    torch.manual_seed(0)
    sizes = {"img_size": 20, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 12, "num_heads": 3}
    model = timm.models.VisionTransformer(**{**sizes, "num_classes": 10, **changed})
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    return model


ASKED = {
    "similarity": (
        lambda: atdiag.similarity("deit_s", "dinov2_s", layers=(0, 11), images=8),
        "similarity deit_s dinov2_s --layers 0,11 --images 8",
        2,
    ),
    "intervene": (
        lambda: atdiag.intervene("deit_s", with_=["uniform", "shuffled"], layers="top:2", images=[3, 5, 9]),
        "intervene deit_s --with uniform --with shuffled --layers top:2 --images 3,5,9",
        2,
    ),
    "attention-stats": (
        lambda: atdiag.attention_stats("deit_s", layers=5, images=8, rank_images=4),
        "attention-stats deit_s --layers 5 --images 8 --rank-images 4",
        1,
    ),
    "maps": (
        lambda: atdiag.maps("deit_s", "clip_b", images=[1], layers=(0, 11), query=("centre", "3,4"), head=1),
        "maps deit_s clip_b --images 1 --layers 0,11 --query centre --query 3,4 --head 1",
        2,
    ),
    "probe": (
        lambda: atdiag.probe("deit_s", layers="11", train=60, images=40, data={"clutter": 1}),
        "probe deit_s --layers 11 --train 60 --images 40 --set data.clutter=1",
        2,
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_is_that_of_the_command(name, tmp_path):
    ask, line, figures = ASKED[name]
    answer = ask()
    assert answer.command == name and answer.runs == ()
    assert list(Path().iterdir()) == []
    code, out = ran(*line.split(), "--json", "--out", tmp_path / "out")
    assert code == 0
    typed = json.loads(out.splitlines()[-1])
    assert typed["rows"] == json.loads(answer.frame().to_json(orient="records"))
    assert {
        key: value for key, value in typed.items() if key not in ("files", "missing")
    }.keys() == answer.document.keys()
    assert len(answer.figures) == figures and all(isinstance(one, Figure) for one in answer.figures)
    assert len([file for file in typed["files"] if file.endswith(".png")]) == figures
    if name in ("similarity", "intervene", "probe"):
        assert answer.verdict


def test_trace_returns_tensors_and_writes_the_commands_file(tmp_path):
    answer = atdiag.trace("deit_s", ["map", "v"], layers=[0, 11], images=4, out=tmp_path / "python.safetensors")
    assert answer.found["map", 11].shape == (4, 2, 26, 26) and answer.frame().tensor.tolist() == list(
        answer.document["tensors"]
    )
    line = f"trace deit_s --what map,v --layers 0,11 --images 4 -o {tmp_path}/typed.safetensors"
    assert ran(*line.split())[0] == 0
    one, other = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("python", "typed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_networks_of_ones_own_are_subjects():
    model = tiny()
    answer = atdiag.similarity(model, "deit_s", images=8, label=("mine", "deit"))
    assert answer.found[0].a == "mine" and model.training
    ids = [one["id"] for one in answer.document["subjects"]]
    assert len(ids[0]) == 64
    again = atdiag.similarity(tiny(), "deit_s", images=8)
    assert [one["id"] for one in again.document["subjects"]] == ids
    np.testing.assert_allclose(again.frame().jsd_optimal, answer.frame().jsd_optimal)
    assert atdiag.similarity(tiny(), tiny(), images=8).frame().jsd_optimal.max() < 1e-6
    changed = atdiag.intervene(tiny(), from_="clip_b", layers=0, images=8)
    assert set(changed.frame().replaced) == {"map of clip_b (mini)"}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: atdiag.similarity("deit_s"), "nothing to compare with"),
        (lambda: atdiag.maps(), "no subject is named"),
        (lambda: atdiag.maps("deit_z"), "no teacher, run or file is named 'deit_z', did you mean 'deit_s'"),
        (lambda: atdiag.maps(torch.nn.Linear(2, 2)), "Linear can't be looked into"),
        (lambda: atdiag.maps("deit_s", head="some"), "`head` 'some'"),
        (lambda: atdiag.trace("deit_s", layers=99), "`layers`=99"),
        (lambda: atdiag.trace("deit_s", out="x.pt"), "`out` x.pt is not the name of a .safetensors file"),
        (
            lambda: atdiag.attention_stats(tiny(img_size=24)),
            "the network sees 24 x 24",
        ),
        (lambda: atdiag.probe("deit_s", settings={"data.clatter": 1}), "'data.clatter' is not a setting"),
    ],
)
def test_wrong_input_is_a_user_error(ask, message):
    with pytest.raises(UserError, match=message):
        ask()
    assert list(Path().iterdir()) == []


def test_progress_in_a_notebook(monkeypatch, capsys):
    """rich says that this is a notebook; the bars are tqdm's, as text where there are no widgets."""
    from atdiag.core.progress import Progress
    from atdiag.reports import console

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    left = iter((3, 1))
    monkeypatch.setattr(console, "_REFRESH", 0)
    with console.training(3, lambda: next(left)) as report:
        report(Progress(1, 10, images=64, doing="training"))
        report(Progress(10, 10, images=640, doing="training"))
    with console.counted("hashing", 4) as count:
        count(4, 4)
    with console.staged() as report:
        report(Progress(1, 2, doing="testing"))
    shown = capsys.readouterr().err
    assert "0/3 runs" in shown and "2/3 runs" in shown and "hashing" in shown and "testing" in shown
