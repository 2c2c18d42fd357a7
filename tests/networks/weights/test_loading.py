"""From a reference to a teacher with weights: files, cache folder, the hub's cache, sha256, and a real ViT."""

import copy
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.timm import architectures
from atdiag.networks.weights import loading, pull, sources
from atdiag.networks.weights.sources import WeightsError, WeightsMissingError
from tests.networks.weights import checkpoints

DATA = Path(os.environ.get("ATDIAG_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
TINY = DATA / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
needs_tiny = pytest.mark.skipif(not TINY.exists(), reason=f"no real ViT-Ti at {TINY}")
PX = 32


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Use a cache of this test's own, and no network."""
    monkeypatch.setenv("ATDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Save a random ViT-Ti to a file; return the file and the network."""
    source = teachers.source("timm:vit_tiny_patch16_224")
    model = checkpoints.drawn(source, PX)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def same_outputs(teacher, model, inside=False):
    """Compare in float64, since random networks are ill-conditioned; ``inside``: all tokens after the last norm."""
    images = torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(3)).double()
    teacher, model = copy.deepcopy(teacher).double(), copy.deepcopy(model).double()
    normal = (images - teacher.mean) / teacher.std
    with torch.no_grad():
        ours = teacher.norm(teacher.blocks(teacher.embed(images))) if inside else teacher(images)
        theirs = model.forward_features(normal) if inside else model(normal)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_users_own_file(tiny, tmp_path, monkeypatch):
    model, path = tiny
    found = teachers.teacher(f"timm:vit_tiny_patch16_224@{path}", "mini", PX)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = loading.load(found)
    assert loaded.network == found.network
    assert not loaded.training
    same_outputs(loaded, model)
    # A path typed relative to this folder is found from anywhere.
    monkeypatch.chdir(path.parent)
    relative = teachers.teacher(f"timm:vit_tiny_patch16_224@{path.name}", "mini", PX)
    monkeypatch.chdir(tmp_path)
    assert relative == found
    loading.load(relative)


def test_a_changed_file_is_refused(tiny, tmp_path):
    _, path = tiny
    own = tmp_path / "own.safetensors"
    shutil.copy(path, own)
    planned = teachers.teacher(f"timm:vit_tiny_patch16_224@{own}", "mini", PX)
    about = own.stat()
    content = bytearray(own.read_bytes())
    content[-1] ^= 1
    own.write_bytes(content)
    os.utime(own, ns=(about.st_atime_ns, about.st_mtime_ns))  # even with the old size and time: loading reads the bytes
    with pytest.raises(WeightsError, match="is not the file this run was made with"):
        loading.load(planned)
    own.unlink()
    with pytest.raises(WeightsMissingError, match="there is no such file"):
        loading.load(planned)


def test_a_damaged_file_is_refused_when_planning(tiny, tmp_path):
    _, path = tiny
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cut\.safetensors is truncated"):
        teachers.teacher(f"timm:vit_tiny_patch16_224@{tmp_path / 'cut.safetensors'}", "mini", PX)


# --- authors' checkpoints ------------------------------------------------------------------------------------------


def published(name, path):
    """Write a published checkpoint at full size (at a small resolution); return it and its network."""
    layouts = {"mocov3_s": checkpoints.mocov3, "dinov2_reg_s": checkpoints.dinov2_registers}
    model = checkpoints.drawn(teachers.source(name), 28 if "dinov2" in name else PX)
    torch.save(layouts[name](model.state_dict()), path)
    return model


def test_mocov3_from_the_cache_folder(alone):
    plan = teachers.teacher("mocov3_s", "paper", PX)
    assert plan.sha256 is None
    assert (plan.network.heads, plan.network.width) == (12, 384)
    place = alone / "cache" / "mocov3_s.pth"
    assert str(place) in teachers.how_to_get(plan)
    with pytest.raises(WeightsMissingError, match=r"no weights of mocov3_s on this machine: 'atdiag teachers pull"):
        loading.load(plan)

    place.parent.mkdir()
    model = published("mocov3_s", place)
    with pytest.raises(WeightsError, match="planned without weights"):
        loading.load(plan)
    found = teachers.teacher("mocov3_s", "paper", PX)
    loaded = loading.load(found)
    assert loaded.network.heads == loaded.blocks[0].attn.num_heads == 12
    same_outputs(loaded, model, inside=True)

    told = loaded.origin
    assert (told.format, told.branch) == ("mocov3", "state_dict: module.base_encoder.*")
    assert (told.file, told.sha256) == (str(place), found.sha256)
    assert "module.predictor.0.weight" in told.dropped


def test_mocov3_in_six_heads_is_refused(alone):
    path = alone / "vit-s-300ep.pth.tar"
    published("mocov3_s", path)
    found = teachers.teacher(f"timm:vit_small_patch16_224.dino@{path}", "paper", PX)
    assert found.network.heads == 6
    with pytest.raises(WeightsError, match=r"width 384 has 12 heads, not 6: use mocov3_s@"):
        loading.load(found)
    loading.load(teachers.teacher(f"mocov3_s@{path}", "paper", PX))


@pytest.mark.slow
def test_a_checkpoint_of_another_row_is_refused_with_that_row(alone):
    """timm's BEiT v2 is the fine-tuned one: mean of the patches, fc_norm, and a head."""
    path = alone / "beitv2_base_patch16_224_pt1k.pth"
    layout = replace(checkpoints.LAYOUTS["beitv2"], source=teachers.source("beitv2_b"))
    checkpoints.write(layout, checkpoints.network(layout, PX), path)
    with pytest.raises(WeightsError) as fault:
        loading.load(teachers.teacher(f"timm:beitv2_base_patch16_224@{path}", "paper", PX))
    assert "missing: fc_norm.weight, fc_norm.bias;" in str(fault.value)
    assert "left over: norm.weight, norm.bias" in str(fault.value)
    assert str(fault.value).endswith(f"type beitv2_b@{path}")
    loaded = loading.load(teachers.teacher(f"beitv2_b@{path}", "paper", PX))
    assert loaded.network.components == ("layer_scale", "no_abs_pos", "no_k_bias", "rel_pos_bias")


def test_a_teacher_does_not_follow_later_changes_of_its_file(tiny, tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(tiny[0].state_dict(), path)
    loaded, _ = loading.load_source(teachers.source("timm:vit_tiny_patch16_224"), path, PX)
    before = copy.deepcopy(loaded.state_dict())
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_dinov2_with_registers_from_its_authors(alone):
    path = alone / "dinov2_vits14_reg4_pretrain.pth"
    published("dinov2_reg_s", path)
    loaded = loading.load(teachers.teacher(f"dinov2_reg_s@{path}", "paper", 28))
    assert loaded.network.registers == 4


# --- the hub -------------------------------------------------------------------------------------------------------


def in_hub_cache(root, repository, path, revision="abc"):
    folder = root / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    shutil.copy(path, folder / "snapshots" / revision / "model.safetensors")


def test_the_hubs_cache_is_used_without_a_network(alone, tiny):
    model, path = tiny
    name = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert teachers.teacher(name, "small", PX).sha256 is None
    in_hub_cache(alone, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", path)
    found = teachers.teacher(name, "small", PX)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    same_outputs(loading.load(found), model)
    got = pull.pull(name.removesuffix(".augreg_in21k_ft_in1k"))  # timm's default weights of the model
    assert got.was_here
    assert got.sha256 == found.sha256


@pytest.mark.parametrize("name", ["deit_s", "mocov3_s", "timm:vit_tiny_patch16_224"])
def test_offline_mode_is_respected_with_a_hint(name, alone, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    plan = teachers.teacher(name, "paper", PX)
    with pytest.raises(WeightsMissingError) as fault:
        loading.load(plan)
    assert f"'atdiag teachers pull {name}' downloads them" in str(fault.value)
    assert str(alone / "cache") in str(fault.value)
    with pytest.raises(UserError, match="offline mode is on") as offline:
        pull.pull(name)
    assert "https://" in str(offline.value)
    assert str(alone / "cache") in str(offline.value)


# --- fetching ------------------------------------------------------------------------------------------------------


def test_a_downloaded_checkpoint_is_kept_only_if_it_fits(alone, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def download(url, path, progress):
        asked.append(url)
        torch.save({"state_dict": {"module.base_encoder.patch_embed.proj.weight": torch.ones(3)}}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(WeightsError, match="does not fit mocov3_s: missing"):
        pull.pull("mocov3_s")
    assert asked == [teachers.row("mocov3_s").url]
    assert [path.name for path in (alone / "cache").rglob("*.pth")] == []

    def stop(url, path, progress):
        Path(path).write_bytes(b"half")
        raise OSError("connection reset")

    monkeypatch.setattr(torch.hub, "download_url_to_file", stop)
    with pytest.raises(UserError, match=r"mocov3_s can't be fetched \(connection reset\)"):
        pull.pull("mocov3_s")
    assert list((alone / "cache").iterdir()) == []

    def succeed(url, path, progress):
        model = checkpoints.drawn(teachers.source("mocov3_s"), 224)
        torch.save(checkpoints.mocov3(model.state_dict()), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", succeed)
    got = pull.pull("mocov3_s")
    assert (got.was_here, got.branch) == (False, "state_dict: module.base_encoder.*")
    assert teachers.teacher("mocov3_s", "paper").sha256 == got.sha256


def test_only_https_is_used(alone, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    plain = replace(teachers.source("mocov3_s"), url="http://example.com/x.pth")
    monkeypatch.setattr(teachers, "source", lambda _: plain)
    with pytest.raises(UserError, match="not an https address"):
        pull.pull("mocov3_s")


# --- sha256 --------------------------------------------------------------------------------------------------------


def test_the_sha256_of_a_large_file_is_remembered_until_it_changes(alone, monkeypatch):
    path = alone / "large.bin"
    path.write_bytes(os.urandom(sources._WORTH_REMEMBERING))
    counted, fresh = [], sources.fresh_sha256
    monkeypatch.setattr(sources, "fresh_sha256", lambda p: counted.append(p) or fresh(p))
    first = sources.sha256(path)
    assert sources.sha256(path) == first == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(counted) == 1
    about = path.stat()
    path.write_bytes(os.urandom(sources._WORTH_REMEMBERING))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert sources.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() != first
    for note in (alone / "cache" / "sha256").iterdir():
        note.write_text("{")  # a record damaged by a crash
    assert sources.sha256(path) == fresh(path)


def test_an_unwritable_cache_folder_costs_only_time(alone, monkeypatch):
    (alone / "file").write_text("")
    monkeypatch.setenv("ATDIAG_CACHE", str(alone / "file" / "below"))
    path = alone / "large.bin"
    path.write_bytes(b"\1" * sources._WORTH_REMEMBERING)
    assert sources.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# --- a real ViT ----------------------------------------------------------------------------------------------------


@needs_tiny
def test_the_real_vit_loads_at_any_resolution():
    for size in (128, 224):
        found = teachers.teacher(f"timm:vit_tiny_patch16_224@{TINY}", "small", size)
        loaded = loading.load(found)
        assert (found.network.tokens, found.network.classes) == ((size // 16) ** 2 + 1, 1000)
        assert loaded.network == found.network
    source = teachers.source(f"timm:vit_tiny_patch16_224@{TINY}")
    model, _ = loading.load_source(source, TINY, 224)
    from safetensors.torch import load_file

    assert torch.equal(model.pos_embed, load_file(TINY)["pos_embed"])  # untouched at its own resolution


CLASSES = {  # the ten classes of Imagenette: WordNet id -> ImageNet index
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


@pytest.mark.slow
@needs_tiny
def test_the_real_vit_is_as_accurate_as_it_should_be():
    import io
    import zipfile

    import numpy as np
    from PIL import Image

    teacher = loading.load(teachers.teacher(f"timm:vit_tiny_patch16_224@{TINY}", "small", 224))
    with zipfile.ZipFile(DATA / "imagenette-128.zip") as archive:
        names = sorted(name for name in archive.namelist() if "/val/" in name and name.endswith(".JPEG"))[::13]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    pixels = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([list(CLASSES).index(name.split("/")[-2]) for name in names])
    with torch.no_grad():
        logits = torch.cat([teacher(part) for part in batch.split(50)])
    assert len(labels) > 250
    among_ten = (logits[:, list(CLASSES.values())].argmax(1) == labels).float().mean()
    among_all = (logits.argmax(1) == torch.tensor(list(CLASSES.values()))[labels]).float().mean()
    assert among_ten > 0.95  # 0.967 when this was written
    assert among_all > 0.55  # 0.609: 128 px of JPEG, enlarged


def test_planning_claims_nothing_about_unread_weights(alone):
    plan = teachers.teacher("beitv2_b", "paper")
    assert json.loads(plan.model_dump_json())["sha256"] is None
    assert architectures.network(teachers.source("beitv2_b"), 224) == plan.network
