"""Trained students for others: in timm's layout where timm has the function, else with a loader."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save

import atdiag
from atdiag.api import cards, exporting
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.core.spec import Data, Init, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.model import students
from atdiag.networks.registry import teachers
from tests.commands import ran, wrong

SIZES = {"image_size": 20, "patch_size": 4, "channels": 1, "width": 16, "depth": 2, "heads": 2, "classes": 10}
MODERN = (
    *("rope", "qk_norm", "swiglu", "rms_norm", "mlp_norm", "attn_norm", "post_norm", "gelu_tanh", "no_qkv_bias"),
    *("no_proj_bias", "patch_norm", "no_last_norm", "distillation_token"),
)
"""Components of which no student is written as a class of timm."""
VALUES = {
    "distillation_token": {"registers": 1},
    "layer_scale": {"layer_scale_init": 0.3},
    "registers": {"registers": 3},
    "ln_eps": {"norm_eps": 1e-5},
}
BEIT = ("layer_scale", "mean_pool", "no_abs_pos", "no_k_bias", "rel_pos_bias")
CLIP = ("ln_eps", "no_patch_bias", "pre_norm", "quick_gelu")


def network(*components, **changed) -> Network:
    values = {key: value for name in components for key, value in VALUES.get(name, {}).items()}
    return Network.model_validate({**SIZES, "mean": (0.2,), "components": components, **values, **changed})


def finished(store: Store, of: Network, **parts):
    """Return a run that is finished as far as files show, with weights that are away from their initial values."""
    parts.setdefault("recipe", Recipe(epochs=2, batch_size=16))
    spec = RunSpec(network=of, data=Data(train=100), seed=Seed(data=0, model=0), **parts)
    run = store.create(spec)
    vit = students.build(of, 3)
    like = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=like))
    run.write("weights.safetensors", save({name: t.contiguous() for name, t in vit.state_dict().items()}))
    run.finish({"top1": 71.25, "test_images": 400})
    return run, vit.eval()


def pixels(of: Network) -> torch.Tensor:
    size = of.image_size
    return torch.rand(4, of.channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


TIMMS = {
    "standard": network(),
    "in colour, of another MLP": network(channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), mlp_ratio=3.0),
    "no class token": network(class_token=False),
    **{name: network(name) for name in ("layer_scale", "registers", "no_patch_bias", "quick_gelu", "ln_eps")},
    **{name: network(name) for name in ("no_k_bias", "no_abs_pos", "mean_pool", "attention_pool", "rel_pos_bias")},
    **{name: network(name) for name in ("norm_before_pool", "pool_includes_prefix")},  # idle with a class token's head
    "beit": network(*BEIT),
    "beit with a class token's head": network(*(name for name in BEIT if name != "mean_pool")),
    "clip": network(*CLIP),
    "dinov2 with registers": network("layer_scale", "registers"),
}
OWN = {
    "a norm before the blocks, and a patch bias": network("pre_norm"),
    "registers and position biases": network("registers", "rel_pos_bias"),
    "beit with quick GELU": network(*BEIT, "quick_gelu"),
    **{name: network(name) for name in MODERN},
}


@pytest.mark.parametrize("name", TIMMS)
def test_timm_gives_the_same_logits(store, tmp_path, name):
    run, student = finished(store, TIMMS[name])
    files = atdiag.export_model(run, tmp_path / "out" / "student")
    assert [path.name for path in files] == list(exporting.TIMM_FILES)
    assert sorted(path.name for path in (tmp_path / "out" / "student").iterdir()) == sorted(exporting.TIMM_FILES)
    model = timm.create_model(f"local-dir:{tmp_path}/out/student", pretrained=True).eval()
    config, of = model.pretrained_cfg, student.network
    assert config["input_size"] == (of.channels, of.image_size, of.image_size)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected, found = student(pixels(of)), model((pixels(of) - mean) / std)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std(0).min() > 1e-4  # the images matter


def test_every_component_is_covered():
    from atdiag.networks.model.components import COMPONENTS

    chosen = {name for of in (*TIMMS.values(), *OWN.values()) for name in of.components}
    assert chosen == {name for name, component in COMPONENTS.items() if not component.followed}


@pytest.mark.parametrize("name", OWN)
def test_a_loader_comes_along_where_timm_has_no_such_class(store, tmp_path, name):
    run, student = finished(store, OWN[name])
    files = atdiag.export_model(run, tmp_path / "student")
    assert [path.name for path in files] == ["README.md", "student.safetensors", "student.json", "loader.py"]
    loaded = atdiag.load_student(tmp_path / "student")
    assert torch.equal(loaded(pixels(student.network)), student(pixels(student.network)))
    assert "timm has no class" in (tmp_path / "student" / "README.md").read_text()


def copying(store, teacher="deit_s"):
    of = teachers.teacher(teacher, "mini")
    standard = of.network.student(())
    transfer = Transfer(method="copy", layers=tuple(range(standard.depth)))
    return *finished(store, standard, teacher=of, transfer=transfer), of


def test_a_copying_student_brings_its_loader_and_needs_its_teacher(store, tmp_path):
    from atdiag.analysis import subjects
    from atdiag.training import evaluation
    from atdiag.transfer import methods
    from atdiag.transfer.observation import of_teacher

    run, student, _ = copying(store, "dinov2_reg_s")
    atdiag.export_model(run, tmp_path / "student")
    body = subjects.find(run.id, store=store).body
    x = pixels(student.network)
    shown = evaluation.fit(body.teacher.observe(x, of_teacher([body.transfer])), body.teacher, student.network)
    expected = methods.forward_test(body.network, body.transfer, x, shown)
    code = "import torch, loader; x = torch.load('x.pt'); torch.save(loader.load()(x), 'y.pt')"
    torch.save(x, tmp_path / "student" / "x.pt")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "student", check=True)
    assert torch.equal(torch.load(tmp_path / "student" / "y.pt"), expected)
    assert not torch.allclose(expected, student(x), atol=1e-3)
    assert "works only together with its teacher" in (tmp_path / "student" / "README.md").read_text()


def test_a_copying_student_whose_teacher_is_missing_says_so(store, tmp_path):
    run, *_ = copying(store)
    atdiag.export_model(run, tmp_path / "student")
    described = json.loads((tmp_path / "student" / "student.json").read_text())
    described["teacher"] |= {"name": "timm:vit_tiny_patch16_224", "profile": "small"}
    (tmp_path / "student" / "student.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"copies its teacher's attention: .*give teacher=FILE"):
        atdiag.load_student(tmp_path / "student", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no student with a loader"):
        atdiag.load_student(tmp_path)


def test_the_card_says_what_the_student_is_and_holds_no_path(store, tmp_path):
    file = tmp_path / "secret" / "weights.safetensors"
    teacher = Teacher(name=f"timm:vit_tiny_patch16_224@{file}", profile="small", network=network(), sha256="a" * 64)
    run, _ = finished(
        store,
        network(),
        teacher=teacher,
        init=Init(source="teacher", reinit=("attn",)),
        transfer=Transfer(method="distill", layers=(0, 1)),
    )
    experiment = tmp_path / "e.json"
    arm = {"arm": "reinit | <b>", "runs": [run.id], "top1": 71.2, "contrast": 3.25, "ci_low": 1.0, "ci_high": 5.5}
    study = {"study": f"x@{file}", "arms": [{**arm, "seeds": 3, "p_holm": 0.01}], "verdict": "It helps [a](b)."}
    experiment.write_text(json.dumps({"ablation": "reinit", "studies": [study]}))
    atdiag.export_model(run, tmp_path / "out", experiment)
    text = (tmp_path / "out" / "README.md").read_text()
    for said in ("digits", "the teacher's weights, with attn drawn anew", "distill in blocks 0-1", "71.25 % of 400"):
        assert said in text
    for said in ("+3.2 [+1.0, +5.5]", "It helps \\[a\\](b)", "reinit \\| &lt;b&gt;", "aaaaaaaaaaaaaaaa", "own file"):
        assert said in text
    assert '"weight_decay": 0.05' in text and "the teacher's licence" in text
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and b"secret" not in path.read_bytes(), path
    experiment.write_text(json.dumps({"ablation": "reinit", "studies": []}))
    with pytest.raises(UserError, match=r"no arm of .* has the run"):
        atdiag.export_model(run, tmp_path / "other", experiment)
    assert not (tmp_path / "other").exists()
    assert cards.plain("a|b <i> `c`\n/home/me/x.pt") == "a\\|b &lt;i&gt; \\`c\\` x.pt"


def test_refusals_leave_nothing(store, tmp_path, monkeypatch, capsys):
    run, _ = finished(store, network())
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("mine")
    unfinished = store.create(run.spec.model_copy(update={"seed": Seed(data=1, model=1)}))
    itself = finished(
        store,
        network(),
        recipe=Recipe(epochs=0, batch_size=1),
        teacher=Teacher(name="deit_s", profile="mini", network=network(), sha256="0" * 64),
        init=Init(source="teacher", head=True),
    )[0]
    before = sorted(tmp_path.rglob("*"))
    at = ("--runs", store.root)
    assert "is there already" in wrong(capsys, "runs", "export-model", run.id, "-o", full, *at)
    assert "is there already" in wrong(capsys, "runs", "export-model", run.id, "-o", full / "x", *at)
    assert "is not finished" in wrong(capsys, "runs", "export-model", unfinished.id, "-o", tmp_path / "new", *at)
    assert "no run in" in wrong(capsys, "runs", "export-model", "abcdef", "-o", tmp_path / "new", *at)
    assert "no file" in wrong(
        capsys, "runs", "export-model", run.id, "-o", tmp_path / "new", "--experiment", tmp_path / "e.json", *at
    )
    assert "is a teacher as it is" in wrong(capsys, "runs", "export-model", itself.id, "-o", tmp_path / "new", *at)
    with pytest.raises(UserError, match="there is no run"):
        atdiag.export_model(tmp_path / "none", tmp_path / "new")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            atdiag.export_model(run, tmp_path / "new" / "student")
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert [path for path in left if path.is_file() or path.name.startswith(".")] == []


def test_the_command_writes_into_an_empty_folder(store, tmp_path):
    run, _ = finished(store, network())
    (tmp_path / "empty").mkdir()
    code, out = ran("runs", "export-model", run.id[:6], "-o", tmp_path / "empty", "--runs", store.root, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["timm"] is True
    assert {path.name for path in (tmp_path / "empty").iterdir()} == set(exporting.TIMM_FILES)
