"""The forms of a checkpoint that people have: each is written from a random network and gives that network back."""

import argparse
import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from atdiag.networks.weights import adaptation, files, formats, loading, sources
from atdiag.networks.weights.sources import WeightsError
from tests.networks.weights.checkpoints import SIZE, drawn, other, prefixed
from tests.networks.weights.checkpoints import VIT as HEADLESS

PLAIN = {key: value for key, value in HEADLESS.arguments.items() if key != "num_classes"}
VIT = replace(HEADLESS, arguments=PLAIN, file=pathlib.Path("own"))
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ten():
    """Draw a network with a head for ten classes."""
    return drawn(replace(VIT, arguments={**PLAIN, "num_classes": 10}))


@pytest.fixture(scope="module")
def state(ten):
    return ten.state_dict()


def timm_best(state):
    """As timm's train script writes model_best.pth.tar."""
    return {
        "epoch": 3,
        "arch": "vit_small_patch16_224",
        "state_dict": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(model="vit_small_patch16_224", lr=0.1, output=pathlib.Path("out")),
        "amp_scaler": {"scale": 1.0},
        "metric": np.float64(71.5),
    }


FORMS = {
    "bare": (lambda s: s, "*"),
    "DDP": (lambda s: prefixed("module.", s), "module.*"),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "_orig_mod.*"),
    "DDP of compiled": (lambda s: prefixed("module._orig_mod.", s), "module._orig_mod.*"),
    "compiled DDP": (lambda s: prefixed("_orig_mod.module.", s), "_orig_mod.module.*"),
    "Lightning model.": (lambda s: {"state_dict": prefixed("model.", s), "callbacks": {}}, "state_dict: model.*"),
    "Lightning net.": (lambda s: {"state_dict": prefixed("net.", s)}, "state_dict: net.*"),
    "backbone.": (lambda s: prefixed("backbone.", s), "backbone.*"),
    "encoder.": (lambda s: prefixed("encoder.", s), "encoder.*"),
    "student.": (lambda s: prefixed("student.", s), "student.*"),
    "teacher.": (lambda s: prefixed("teacher.", s), "teacher.*"),
    "model": (lambda s: {"model": s, "optimizer": {}}, "model: *"),
    "timm model_best.pth.tar": (timm_best, "state_dict: *"),
    "unknown prefix": (lambda s: prefixed("wrapped.vit.", s), "wrapped.vit.*"),
    "unknown container": (lambda s: {"weights": {"inner": s}}, "weights / inner: *"),
    "five wrappers": (lambda s: {"model": prefixed("module._orig_mod.net.", s)}, "model: module._orig_mod.net.*"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_in_any_order_give_the_same_network(form, ten, state, tmp_path):
    write, branch = FORMS[form]
    head = state if "student" not in form and "teacher" not in form else headless(state)
    torch.save(write(head), tmp_path / "w.pth")
    loaded, found = loading.load_source(VIT, tmp_path / "w.pth", SIZE)
    assert found.branch == branch
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(IMAGES), ten.forward_features(IMAGES))
        if head is state:
            assert torch.equal(loaded(IMAGES), ten(IMAGES))


def headless(state):
    return {key: value for key, value in state.items() if not key.startswith("head.")}


# --- the head ------------------------------------------------------------------------------------------------------


def test_the_number_of_classes_is_read_from_the_file(state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    assert adaptation.planned(VIT, path).arguments["num_classes"] == 10
    save_file(headless(state), path)
    assert adaptation.planned(VIT, path).arguments["num_classes"] == 0
    model, _ = loading.load_source(VIT, path, SIZE)
    assert isinstance(model.head, torch.nn.Identity)


def test_given_classes_and_published_weights_are_kept(state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    assert adaptation.planned(HEADLESS, path) == HEADLESS
    own = replace(VIT, arguments={**PLAIN, "num_classes": 5})
    with pytest.raises(WeightsError, match=r"head.weight \(10 x 48 in the file, 5 x 48 in the network\)"):
        loading.load_source(own, path, SIZE)


def test_mean_pooling_of_a_fine_tuned_mae_is_read_from_the_file(tmp_path):
    model = drawn(replace(VIT, arguments={**PLAIN, "num_classes": 10, "global_pool": "avg"}))
    assert "fc_norm.weight" in model.state_dict() and "norm.weight" not in model.state_dict()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    loaded, _ = loading.load_source(VIT, tmp_path / "mae.pth", SIZE)
    assert loaded.global_pool == "avg"
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


# --- precision, shards, folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_half_precision(dtype, suffix, state, tmp_path):
    path, half = tmp_path / f"w.{suffix}", {key: value.to(dtype) for key, value in state.items()}
    save_file(half, path) if suffix == "safetensors" else torch.save(half, path)
    loaded, _ = loading.load_source(VIT, path, SIZE)
    assert all(torch.equal(value, half[key].float()) for key, value in loaded.state_dict().items())


def sharded(state, folder, stem="model", ending="safetensors"):
    """Write two shards with their index; return the index."""
    folder.mkdir(exist_ok=True)
    keys, where = sorted(state), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.{ending}"
        tensors = {key: state[key].contiguous() for key in part}
        save_file(tensors, folder / name) if ending == "safetensors" else torch.save(tensors, folder / name)
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_joined(stem, ending, ten, state, tmp_path):
    index = sharded(state, tmp_path, stem, ending)
    assert files.check(index) == "index"
    assert sources.find(replace(VIT, file=tmp_path)) == index
    loaded, _ = loading.load_source(VIT, index, SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), ten(IMAGES))


def test_the_hash_of_shards_is_of_their_bytes(state, tmp_path):
    a, b = sharded(state, tmp_path / "a"), sharded(state, tmp_path / "b")
    b.write_text(json.dumps(json.loads(b.read_text()), indent=2))  # the same weights
    assert sources.sha256(a) == sources.sha256(b) == sources.fresh_sha256(b)
    sharded(other(state), tmp_path / "b")
    assert sources.sha256(a) != sources.sha256(b)


def test_bad_indices_are_refused(state, tmp_path):
    index = sharded(state, tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "away")
    with pytest.raises(WeightsError, match=r"lists model-00001-of-00002.safetensors, not there: put all shards"):
        files.check(index)
    save_file({"x": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors lacks .* more"):
        files.read(index)
    for content, said in (
        ('{"weight_map": {"a": "../../secret"}}', "no weight file in its own folder"),
        ('{"weight_map": {}}', "lists no shards"),
        ("{}", "is no index of shards"),
        ("[" * 100_000, "is no index of shards"),
    ):
        index.write_text(content)
        with pytest.raises(WeightsError, match=said):
            files.read(index)


def test_a_folder_stands_for_its_weights(state, tmp_path):
    with pytest.raises(WeightsError, match=r"holds no weight file: name one file"):
        sources.find(replace(VIT, file=tmp_path))
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
    with pytest.raises(WeightsError, match=r"holds 2 weight files \(a\.pth, b\.pth\): name one file, as \S+a\.pth"):
        sources.find(replace(VIT, file=tmp_path))
    save_file(state, tmp_path / "model.safetensors")
    assert sources.find(replace(VIT, file=tmp_path)) == tmp_path / "model.safetensors"


def test_a_missing_file_comes_with_a_suggestion(tmp_path):
    (tmp_path / "model_best.pth").touch()
    with pytest.raises(sources.WeightsMissingError, match=r"no such file .*did you mean 'model_best.pth'"):
        sources.find(replace(VIT, file=tmp_path / "model_bset.pth"))
    with pytest.raises(sources.WeightsMissingError, match=r"did you mean 'student'"):
        sources.find(replace(VIT, file=tmp_path / "model_best.pth#studnet"))


# --- several networks ----------------------------------------------------------------------------------------------


def both(state):
    student = {**prefixed("student.backbone.", headless(other(state))), "student.head.mlp.0.weight": torch.ones(3, 3)}
    return {"state_dict": {**prefixed("teacher.backbone.", headless(state)), **student}}


def test_of_a_student_and_a_teacher_either_can_be_chosen(state):
    taken = {branch: formats.convert(both(state), branch) for branch in ("weights", "teacher", "student")}
    assert taken["weights"].branch == taken["teacher"].branch == "state_dict: teacher.backbone.*"
    assert taken["student"].branch == "state_dict: student.backbone.*"
    assert taken["weights"].others == ("state_dict: student.backbone.*",)
    key = "blocks.1.norm1.weight"
    assert torch.equal(taken["weights"].state[key], state[key])
    assert torch.equal(taken["student"].state[key], state[key] + 1)


def test_the_choice_of_a_pair_is_said(state):
    contents = {"student": prefixed("module.backbone.", state), "teacher": prefixed("backbone.", headless(state))}
    assert formats.convert(contents).note == (
        "the teacher network (teacher: backbone.*) was taken; "
        "the file also holds the student (student: module.backbone.*): FILE#student"
    )
    assert not formats.convert({"teacher": contents["teacher"]}).note
    average = formats.convert({**contents, "teacher_ema": {"model_ema": prefixed("backbone.", state)}}, "ema")
    assert average.note == "the moving average (teacher_ema / model_ema) was taken, not the raw weights beside it"


def test_a_choice_of_the_default_is_the_default(state, tmp_path):
    path = tmp_path / "both.pth"
    torch.save(both(state), path)
    assert adaptation.planned(replace(VIT, branch="teacher"), path).branch == "weights"
    assert adaptation.planned(replace(VIT, branch="student"), path).branch == "student"
    torch.save(prefixed("student.", state), path)
    assert adaptation.planned(replace(VIT, branch="student"), path).branch == "weights"
    with pytest.raises(WeightsError, match=r"no network marked as teacher; it has student\.\*: leave #teacher out"):
        adaptation.planned(replace(VIT, branch="teacher"), path)


def test_averages_are_found_as_prefixes_too(state):
    contents = {"state_dict": {**prefixed("model.", state), **prefixed("model_ema.module.", other(state))}}
    raw, mean = formats.convert(contents), formats.convert(contents, "ema")
    assert (raw.branch, mean.branch) == ("state_dict: model.*", "state_dict: model_ema.module.*")
    assert raw.averages == mean.averages == ("model_ema",)


def test_networks_of_equal_rank_are_refused_by_name(state):
    with pytest.raises(WeightsError, match=r"2 networks, with keys that begin with 'net\.', 'encoder\.'"):
        formats.convert({**prefixed("net.", state), **prefixed("encoder.", state)})


def test_an_outline_has_shapes_and_no_values(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    torch.save(timm_best(state), tmp_path / "w.pth")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth", tmp_path / "old.pt", sharded(state, tmp_path / "s")):
        found = formats.convert(files.outline(path)).state
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in state.items()}
        assert all(value.is_meta for value in found.values())
