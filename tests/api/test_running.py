"""``atdiag.run``: the runs of the command, scripts without a guard, the user's networks as teachers."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from matplotlib.figure import Figure

import atdiag
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Network
from atdiag.execution.inprocess import InProcessExecutor
from atdiag.networks.model import students
from atdiag.networks.registry import stored, storing, teachers
from atdiag.networks.weights import loading
from atdiag.study import registry
from tests.commands import SETS, TINY, ran

SETTINGS = dict(item.split("=") for item in TINY)
SETTINGS = {name: json.loads(value) for name, value in SETTINGS.items()}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("ATDIAG_PROFILE", "ATDIAG_RUNS", "ATDIAG_DATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


SCRIPT = """
import atdiag
from atdiag.execution import devices
devices.available_cores = lambda: 1  # one worker: a second one takes seconds to start
answer = atdiag.run("reinit", teacher="deit_s", module="attn", seeds=1, settings={settings}, runs="runs")
print("once", len(answer.runs), answer.frame().name.tolist())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run a script that has no ``if __name__ == "__main__"``: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT.format(settings=SETTINGS))
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=True)
    return folder, done.stdout


def test_a_script_without_a_guard_runs_once(trained):
    folder, printed = trained
    assert printed.count("once") == 1
    assert len(Store(folder / "runs").list()) == 4


def ask(trained, **options):
    """Ask the same again, in this process."""
    return atdiag.run(
        "reinit", "deit_s", module="attn", seeds=1, settings=SETTINGS, runs=trained[0] / "runs", **options
    )


def test_the_answer(trained, tmp_path):
    answer = ask(trained)
    frame = answer.frame()
    assert isinstance(frame, pd.DataFrame) and set(frame.kind) == {"arm", "reference", "contrast"}
    assert [path.name for path in answer.runs] == list(answer.found.runs)
    assert all((path / "result.json").exists() for path in answer.runs)
    assert answer.verdict == answer.found.verdict and answer.verdict in str(answer)
    (figure,) = answer.figures
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    shown = answer._repr_html_()
    assert "<table" in shown and "data:image/png;base64" in shown
    frame["name"] = "changed"
    assert "changed" not in set(answer.frame().name)
    assert list(Path().iterdir()) == []  # nothing is written unless asked
    files = ask(trained, out=tmp_path / "out").written.files
    assert {path.suffix for path in files} == {".csv", ".md", ".tex", ".json", ".txt", ".png", ".pdf"}


def test_the_command_finds_these_runs_finished(trained):
    line = ("reinit", "--teacher", "deit_s", "--module", "attn", "--seeds", "1", "--runs", trained[0] / "runs")
    code, out = ran(*line, *SETS, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out.splitlines()[-1])["runs"]
    assert {one["state"] for one in planned} == {"finished"}
    assert {one["run"] for one in planned} == {path.name for path in ask(trained).runs}


QUESTIONS = {
    "layers": ({"from_": "both", "k": (3, 6), "teacher": "dinov2_s"}, ["--from", "both", "--k", "3,6"]),
    "rescue": ({"teacher": ["clip_b", "beitv2_b"]}, ["--teacher", "clip_b,beitv2_b"]),
    "epochs": ({"teacher": "deit_s"}, ["--teacher", "deit_s"]),
    "datasets": ({"data": "digits,larger", "teacher": "deit_s"}, ["--data", "digits,larger", "--teacher", "deit_s"]),
    "benchmark": ({"data": "larger"}, ["--set", "data.name=larger"]),
    "match": ({"data": {"train": 300, "clutter": 5}}, ["--set", "data.train=300", "--set", "data.clutter=5"]),
    "source": ({"first": "deit_s", "second": "weak"}, ["--first", "deit_s", "--second", "weak"]),
    "recipes": ({"settings": {"transfer.layers": "top:6"}}, ["--set", "transfer.layers=top:6"]),
}


@pytest.mark.parametrize("ablation", [one.name for one in registry.installed() if one.name != "ood"])
def test_the_same_question_names_the_same_runs(ablation):
    """Every installed experiment, in Python and typed."""
    given, typed = QUESTIONS.get(ablation, ({}, []))
    answer = atdiag.run(ablation, seeds=2, dry_run=True, **given)
    code, out = ran(ablation, "--seeds", "2", "--dry-run", "--json", *typed)
    assert code == 0
    planned = json.loads(out.splitlines()[-1])["runs"]
    assert answer.frame()[["arm", "run", "state"]].to_dict("records") == [
        {name: one[name] for name in ("arm", "run", "state")} for one in planned
    ]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("reinet", {}), "unknown experiment 'reinet', did you mean 'reinit'"),
        (("diagnose", {}), "'diagnose' is no experiment: call atdiag.diagnose"),
        (("attention-stats", {}), "'attention-stats' is no experiment: call atdiag.attention_stats"),
        (("reinit", {"modul": "attn"}), "reinit has no option 'modul', did you mean 'module'"),
        (("reinit", {"module": "atn"}), "`module` 'atn', did you mean 'attn'"),
        (("reinit", {"teacher": "klip_b"}), "unknown teacher 'klip_b', did you mean 'clip_b'"),
        (("reinit", {"teacher": 3}), "a int is no teacher"),
        (("reinit", {"teacher": torch.nn.Linear(2, 2)}), "Linear can't be a teacher"),
        (("reinit", {"seeds": 0}), "`seeds` 0"),
        (
            ("reinit", {"settings": {"recipe.epoch": 3}}),
            "'recipe.epoch' is not a setting, did you mean",
        ),
        (("reinit", {"data": "digit"}), "no folder and no data set digit, did you mean 'digits'"),
        (("reinit", {"data": "no/such/folder"}), "no/such/folder"),
        (("reinit", {"device": "gpu"}), "gpu"),
        (("reinit", {"profile": "tiny"}), "unknown profile 'tiny'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(given, message):
    with pytest.raises(UserError, match=message) as fault:
        atdiag.run(given[0], **given[1])
    assert len(str(fault.value).splitlines()) == 1
    assert list(Path().iterdir()) == []


# --- networks as teachers --------------------------------------------------------------------------------------------


def tiny(seed=0, **changed):
    torch.manual_seed(seed)
    sizes = {"img_size": 20, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(**{**sizes, "num_classes": 10, **changed})
    model.pretrained_cfg = {"mean": (0.3,), "std": (0.6,)}
    return model


def test_a_network_is_a_teacher_with_an_identity_of_its_own(tmp_path):
    """It is stored once, trained from in this process, and found again by its file on the command line."""
    model, runs = tiny(), tmp_path / "runs"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {"settings": SETTINGS, "seeds": 1, "runs": runs, "methods": "copy"}
    answer = atdiag.run("benchmark", teacher=model, executor=InProcessExecutor(), **asked)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    (file,) = (runs / "teachers").iterdir()
    assert len(Store(runs).list()) == len(answer.runs) == 3
    again = atdiag.run("benchmark", teacher=tiny(), dry_run=True, **asked)
    assert set(again.frame().state) == {"finished"}
    assert len(list((runs / "teachers").iterdir())) == 1
    line = ("benchmark", "--teacher", file, "--methods", "copy", "--seeds", "1", "--runs", runs, *SETS, "--dry-run")
    code, out = ran(*line, "--json")
    assert code == 0
    assert [run["run"] for run in json.loads(out.splitlines()[-1])["runs"]] == again.frame().run.tolist()
    other = atdiag.run("benchmark", teacher=tiny(seed=1), dry_run=True, **asked)
    assert len(set(other.frame().run) & set(again.frame().run)) == 1  # the baseline
    assert list((runs / "teachers").iterdir()) == [file]  # a dry run leaves nothing
    with pytest.raises(UserError, match="unknown profile"):
        atdiag.run("benchmark", teacher=tiny(seed=2), profile="no", runs=tmp_path / "others")
    assert not (tmp_path / "others").exists()
    assert ran("runs", "verify", "--runs", runs)[0] == 0
    file.unlink()
    assert atdiag.run("benchmark", teacher=tiny(), **asked).frame().equals(answer.frame())  # it is stored anew


def test_a_stored_network_computes_the_same():
    model = tiny(class_token=False, global_pool="avg", init_values=0.1)
    reference = storing.store(model, Path("teachers"))
    assert reference.startswith("file:VisionTransformer@")
    loaded = loading.load(teachers.teacher(reference, "mini", 20))
    pixels = torch.rand(3, 1, 20, 20)
    with torch.no_grad():
        assert torch.allclose(loaded(pixels), model.eval()((pixels - 0.3) / 0.6), atol=1e-5)
    larger = loading.load(teachers.teacher(reference, "mini", 40))
    assert larger.network.grid == 10 and larger(torch.rand(1, 1, 40, 40)).shape == (1, 10)
    with pytest.raises(UserError, match="patches of 4 px, and 21 px is not a multiple"):
        teachers.teacher(reference, "mini", 21)


def test_our_own_network_is_stored_too():
    of = Network(image_size=20, patch_size=4, channels=1, width=16, depth=2, heads=2, classes=10, mean=(0.2,))
    vit = students.build(of, 0).eval()
    loaded = loading.load(teachers.teacher(storing.store(vit, Path("teachers")), "mini", 20))
    pixels = torch.rand(3, 1, 20, 20)
    assert torch.equal(loaded(pixels), vit(pixels)) and loaded.network == of


def test_a_network_that_timm_builds_by_name_is_as_its_file_is():
    """With timm's own sizes it is a file like any other, at any resolution; with other sizes it is stored with them."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    reference = storing.store(model, Path("teachers"))
    assert reference.startswith("timm:vit_tiny_patch16_224") and stored.network(Path(reference.split("@")[1])) is None
    assert teachers.teacher(reference, "small", 128).network.grid == 8
    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, img_size=64)
    reference = storing.store(other, Path("teachers"))
    assert reference.startswith("file:vit_tiny_patch16_224@")
    assert teachers.teacher(reference, "small", 64).label == "vit_tiny_patch16_224 (own file)"
    small = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 3}
    with pytest.raises(UserError, match=r"has parallel_blocks.* make it by timm.create_model"):
        storing.store(timm.create_model("vit_base_patch16_xp_224", **small), Path("teachers"))
    plain = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(UserError, match=r"not known how the images .* set model.pretrained_cfg"):
        storing.store(plain, Path("teachers"))
