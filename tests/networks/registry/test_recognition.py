"""A file named without its architecture is recognised, or refused with a line to type that works."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from atdiag.core.errors import UserError
from atdiag.networks.registry import recognition, teachers
from atdiag.networks.weights import loading
from atdiag.networks.weights.sources import WeightsError

DATA = Path(os.environ.get("ATDIAG_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
REAL = ("deit_tiny_patch16_224.fb_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=3).state_dict()


@pytest.fixture
def file(state, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    return path


def refused(reference):
    with pytest.raises(UserError) as fault:
        teachers.canonical(str(reference))
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize(
    "name", [TINY, "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224"]
)
def test_rows_agree_with_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {row.model: row for row in recognition.table()}[name]
    assert recognition.signature(model.state_dict()) == found.signature
    attention = model.blocks[0].attn
    assert (found.patch, found.width) == (model.patch_embed.patch_size[0], model.embed_dim)
    assert (found.depth, found.heads) == (len(model.blocks), attention.num_heads)


def test_every_row_is_a_different_model():
    names = [row.model for row in recognition.table()]
    assert len(names) == len(set(names)) > 200


def test_what_no_weight_shows_is_asked_for(file, state):
    said = refused(file)
    assert "has the keys and shapes of vit_tiny_patch16_224 (3 heads, pixels with mean 0.5) and of deit_tiny" in said
    lines = re.findall(r"timm:\S+", said)
    assert lines == [f"timm:{name}@{file}" for name in (TINY, "deit_tiny_patch16_224")]
    for line in lines:
        assert teachers.teacher(line, "small", 32).network.classes == 3


@pytest.mark.parametrize("beside", [{"arch": TINY}, {"args": argparse.Namespace(model=TINY)}])
def test_timms_checkpoints_say_their_model(beside, state, tmp_path):
    torch.save({"state_dict": state, **beside}, tmp_path / "model_best.pth.tar")
    assert teachers.canonical(f"{tmp_path}/model_best.pth.tar") == f"timm:{TINY}@{tmp_path}/model_best.pth.tar"
    assert teachers.canonical(str(tmp_path)) == f"timm:{TINY}@{tmp_path}/model_best.pth.tar"


def test_a_name_that_does_not_fit_is_not_believed(state, tmp_path):
    torch.save({"state_dict": state, "arch": "vit_small_patch16_224"}, tmp_path / "vit_base_patch16_224.pth")
    assert "does not say which it is" in refused(tmp_path / "vit_base_patch16_224.pth")


def test_an_architecture_with_one_function_needs_no_name(tmp_path):
    torch.save(timm.create_model("deit_tiny_distilled_patch16_224").state_dict(), tmp_path / "x.pth")
    assert teachers.canonical(str(tmp_path / "x.pth")) == f"timm:deit_tiny_distilled_patch16_224@{tmp_path}/x.pth"
    teacher = teachers.teacher(f"timm:{TINY}@{tmp_path}/x.pth", "small", 32)
    with pytest.raises(WeightsError) as fault:
        loading.load(teacher)
    assert "left over: dist_token" in str(fault.value)
    assert str(fault.value).endswith(f"type timm:deit_tiny_distilled_patch16_224@{tmp_path}/x.pth")


def test_a_path_is_taken_whole(state, tmp_path):
    folder = tmp_path / "a, b: c@d #e"
    folder.mkdir()
    torch.save({"state_dict": state, "arch": TINY}, folder / "w,1.pth")
    found = teachers.teacher(str(folder / "w,1.pth"), "small", 32)
    assert found.name == f"timm:{TINY}@{folder / 'w,1.pth'}"
    assert loading.load(found).network.classes == 3

    from atdiag.cli.experiments import references

    assert references(f"deit_b,{folder / 'w,1.pth'}") == ("deit_b", str(folder / "w,1.pth"))
    assert references(f"{folder / 'w,1.pth'},deit_b") == (str(folder / "w,1.pth"), "deit_b")


def test_a_folder_in_timms_layout(file, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(file, folder / "model.safetensors")
    facts = {"architecture": "deit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {"tag": "fb_in1k"}}
    (folder / "config.json").write_text(json.dumps(facts))
    full = f"timm:deit_tiny_patch16_224.fb_in1k@{folder}/model.safetensors"
    for typed in (folder, f"hf-hub:{folder}", f"local-dir:{folder}", folder / "model.safetensors"):
        assert teachers.canonical(str(typed)) == full
    (folder / "config.json").write_text(json.dumps({**facts, "pretrained_cfg": {"mean": [0.1] * 3}}))
    assert "mean=[0.1, 0.1, 0.1]" in refused(folder) and "register_teacher(" in refused(folder)
    (folder / "config.json").write_text(json.dumps({**facts, "model_args": {"init_values": 0.1}}))
    assert "arguments={'init_values': 0.1}" in refused(folder)
    (folder / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    assert "does not say which it is" in refused(folder)


def test_unknown_keys_come_with_a_model_to_compare(state, tmp_path):
    torch.save({**state, "blocks.0.extra": torch.ones(1)}, tmp_path / "x.pth")
    said = refused(tmp_path / "x.pth")
    assert "the keys of no timm model and of no plain ViT (blocks.0.extra)" in said
    assert f"type timm:{TINY}@{tmp_path}/x.pth to compare it" in said


def test_what_does_not_exist_is_said(tmp_path):
    (tmp_path / "model.pth").touch()
    assert "no such file, did you mean 'model.pth'?" in refused(tmp_path / "modle.pth")
    assert "is not in the hub's cache" in refused("hf-hub:nobody/nothing")
    assert teachers.canonical("deit_b") == "deit_b" and teachers.canonical("deit_bb") == "deit_bb"


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_recognised_by_their_names(name, tmp_path):
    path = DATA / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no real ViT-Ti at {path}")
    assert teachers.canonical(str(path)) == f"timm:{name}@{path.absolute()}"
    (tmp_path / "renamed.safetensors").symlink_to(path)
    assert "does not say which it is" in refused(tmp_path / "renamed.safetensors")
