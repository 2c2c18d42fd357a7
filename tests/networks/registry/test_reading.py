"""A ViT of sizes that no timm model has is read from its own keys and shapes; what they do not show is asked for."""

import json
import re
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from atdiag.core.errors import UserError
from atdiag.networks.registry import reading, teachers
from atdiag.networks.timm import architectures, inspection
from atdiag.networks.weights import loading
from atdiag.networks.weights.sources import Source, WeightsError

PLAIN, BEIT = "vit_base_patch16_224", "beit_base_patch16_224"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@st.composite
def vits(draw):
    """Draw the arguments of a plain ViT of timm."""
    heads, registers, token = draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1, 4])), draw(st.booleans())
    patch, pool = draw(st.integers(2, 6)), "token" if token and draw(st.booleans()) else "avg"
    scale = draw(st.sampled_from([0.0, 1e-5]))
    # Positions of patches alone beside a class token are DeiT III's, which has LayerScale; else they are refused.
    alone = draw(st.booleans()) and (scale > 0 or not token)
    arguments: dict[str, Any] = {
        "num_heads": heads,
        "embed_dim": heads * 16,
        "depth": draw(st.integers(1, 3)),
        "patch_size": patch,
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5, 4.0, 8 / 3])),
        "class_token": token,
        "reg_tokens": registers,
        "no_embed_class": registers > 0 or alone,
        "qkv_bias": draw(st.booleans()),
        "proj_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "init_values": scale,
        "global_pool": pool,
        # Whether the mean of patches is normalised before or after is seen from the norm's name.
        "fc_norm": pool == "avg" and token,
        "num_classes": draw(st.sampled_from([0, 3])),
    }
    return PLAIN, arguments, patch * draw(st.integers(2, 4))


@st.composite
def beits(draw):
    """Draw those of BEiT."""
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    arguments = {
        "num_heads": heads,
        "embed_dim": heads * 16,
        "depth": draw(st.integers(1, 2)),
        "patch_size": patch,
        "mlp_ratio": draw(st.sampled_from([1.0, 4.0])),
        "qkv_bias": draw(st.booleans()),
        "init_values": draw(st.sampled_from([0.0, 1e-5])),
        "use_abs_pos_emb": draw(st.booleans()),
        "use_rel_pos_bias": True,
        "global_pool": draw(st.sampled_from(["avg", "token"])),
        "num_classes": draw(st.sampled_from([0, 3])),
    }
    return BEIT, arguments, patch * draw(st.integers(2, 4))


def drawn(model, arguments, size, seed=0):
    vit = architectures.build(Source("x", model, arguments), size, meta=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return vit


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn_one=st.one_of(vits(), vits(), beits()))
def test_a_network_of_any_size_comes_back_from_its_file(drawn_one, tmp_path):
    model, arguments, size = drawn_one
    vit = drawn(model, arguments, size)
    path = tmp_path / "own.safetensors"
    save_file(vit.state_dict(), path)
    shown = "" if model == BEIT else f"#heads={arguments['num_heads']}"
    teacher = teachers.teacher(f"{path}{shown}#pixels=imagenet", "small", size)
    expected = inspection.describe(vit, **IMAGENET)
    assert teacher.network == expected
    ours = loading.load(teacher)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    if arguments["num_classes"]:
        with torch.no_grad():
            torch.testing.assert_close(ours(images), vit((images - mean) / std), rtol=1e-4, atol=1e-4)
    assert teachers.source(teacher.name).image_size == size


@pytest.fixture
def small():
    return drawn(PLAIN, {"num_heads": 3, "embed_dim": 48, "depth": 2, "patch_size": 8, "num_classes": 3}, 32)


@pytest.fixture
def file(small, tmp_path):
    save_file(small.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def refused(reference, fault=UserError):
    with pytest.raises(fault) as found:
        teachers.teacher(str(reference), "small", 32)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_what_is_not_shown_is_asked_for_in_one_line_that_works(file):
    said = refused(file)
    assert "(patches of 8 px, width 48, 2 blocks) does not show its heads (1, 2, 3 are possible)" in said
    assert "how pixels are normalised (imagenet, inception, clip)" in said
    (line,) = re.findall(r"type (\S+),", said)
    assert line == f"{file}#heads=1#pixels=imagenet"
    assert teachers.teacher(line, "small", 32).network.heads == 1
    assert refused(f"{file}#heads=3").endswith(f"type {file}#heads=3#pixels=imagenet, with what is right for it")
    assert teachers.canonical(f"{file}#pixels=clip#heads=3") == f"vit:mine@{file}#pixels=clip#heads=3"


def test_wrong_facts_are_refused(file, monkeypatch):
    assert "5 heads do not divide the width" in refused(f"{file}#heads=5#pixels=clip")
    assert "#heads=x is no number of heads" in refused(f"{file}#heads=x#pixels=clip")
    assert "unknown pixels 'imagnet', did you mean 'imagenet'?" in refused(f"{file}#heads=3#pixels=imagnet")
    assert "unknown activation 'gellu', did you mean 'gelu'?" in refused(f"{file}#act=gellu")
    assert "did you mean 'heads='?" in refused(f"{file}#head=3")
    monkeypatch.chdir(file.parent)
    assert "did you mean 'heads='?" in refused("mine.safetensors#head=3")
    assert "leave #heads=3 out" in refused(f"timm:vit_tiny_patch16_224@{file}#heads=3")


def test_facts_choose_between_models_of_timm(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), path)
    assert teachers.canonical(f"{path}#pixels=imagenet") == f"timm:deit_tiny_patch16_224@{path}"
    assert teachers.canonical(f"{path}#pixels=inception#heads=3") == f"timm:vit_tiny_patch16_224@{path}"
    twelve = teachers.teacher(f"{path}#pixels=imagenet#heads=12", "small", 32)
    assert twelve.name == f"vit:w@{path}#pixels=imagenet#heads=12" and twelve.network.heads == 12


def test_the_activation_of_a_clip_is_asked_for(tmp_path):
    arguments = {"num_heads": 3, "embed_dim": 48, "depth": 1, "patch_size": 8, "pre_norm": True, "num_classes": 0}
    path = tmp_path / "tower.pth"
    torch.save(drawn(PLAIN, arguments, 32).state_dict(), path)
    assert "its activation (quick_gelu as OpenAI's CLIP" in refused(path)
    found = teachers.teacher(f"{path}#heads=3#act=quick_gelu#pixels=clip", "small", 32).network
    assert {"pre_norm", "quick_gelu"} <= set(found.components) and found.norm_eps == 1e-5


def test_networks_that_are_no_plain_vit_are_refused_by_key(small, tmp_path):
    for change, said in (
        (lambda s: {**s, "patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}, "1 channels, and not 3"),
        (lambda s: {k: v for k, v in s.items() if "fc2" not in k}, "it has no 'blocks.0.mlp.fc2.weight'"),
        (lambda s: {**s, "pos_embed": torch.ones(1, 19, 48)}, "pos_embed has 19 rows, which is no square grid"),
        (lambda s: {**s, "blocks.1.attn.gate.weight": torch.ones(1)}, "no plain ViT (blocks.1.attn.gate.weight)"),
        (lambda s: {**s, "blocks.1.mlp.fc1.weight": torch.ones(8, 48)}, "no plain ViT (blocks.1.mlp.fc1.weight)"),
    ):
        torch.save(change(small.state_dict()), tmp_path / "w.pth")
        assert said in refused(f"{tmp_path}/w.pth#heads=3#pixels=clip")


def test_the_title_is_the_files_or_its_folders(small, tmp_path):
    folder = tmp_path / "my run @3"
    folder.mkdir()
    torch.save(small.state_dict(), folder / "pytorch_model.bin")
    assert reading.title(folder / "pytorch_model.bin") == "my-run-3"
    assert reading.title(folder / "best.pth.tar") == "best"
    name = teachers.canonical(f"{folder}/pytorch_model.bin#heads=3#pixels=clip")
    assert name.startswith("vit:my-run-3@")
    loaded = loading.load(teachers.teacher(name, "small", 32))
    assert loaded.network.classes == 3


def test_images_that_are_not_normalised_are_told_by_their_preprocessor(file):
    (file.parent / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    found = teachers.teacher(f"{file}#heads=3", "small", 32).network
    assert set(found.mean) == {0.0} and set(found.std) == {1.0}


def test_a_missing_file_is_said(tmp_path):
    assert "there is no such file" in refused(f"vit:x@{tmp_path}/x.pth#heads=3")
    with pytest.raises(WeightsError):
        (tmp_path / "x.pth").write_bytes(b"no weights")
        teachers.canonical(f"{tmp_path}/x.pth#heads=3")


def test_a_grid_that_is_not_square_is_not_taken_for_one():
    """8 patches and a class token have as many positions as 3 x 3 patches without one."""
    made = timm.create_model(PLAIN, img_size=(48, 24), patch_size=12, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    assert made.pos_embed.shape[1] == 9
    with pytest.raises(WeightsError, match=r"pos_embed has 9 rows: .* and nothing tells which"):
        reading.sizes(made.state_dict())
    deit3 = timm.create_model(
        PLAIN, img_size=36, patch_size=12, embed_dim=32, depth=1, num_heads=2, no_embed_class=True, init_values=1e-4
    )
    assert reading.sizes(deit3.state_dict())[1]["no_embed_class"]
