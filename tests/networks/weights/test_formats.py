"""Authors' key layouts: each is written from a random network, read back, and corrupted in every way."""

from dataclasses import replace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import beit, vision_transformer

from atdiag.networks.timm import architectures
from atdiag.networks.weights import formats, loading
from atdiag.networks.weights.sources import WeightsError
from tests.networks.weights import checkpoints
from tests.networks.weights.checkpoints import LAYOUTS, SIZE, VIT

IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
FLAT = [name for name, layout in LAYOUTS.items() if layout.branch == "*"]


@pytest.fixture(scope="module")
def networks():
    """Build the network behind each layout once."""
    return {name: checkpoints.network(layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_gives_the_same_network(name, networks, tmp_path):
    layout, model = LAYOUTS[name], networks[name]
    path = checkpoints.write(layout, model, tmp_path / "checkpoint.pth")
    loaded, found = loading.load_source(layout.source, path, SIZE)
    assert (found.format, found.branch) == (layout.format, layout.branch)
    assert set(layout.dropped) <= set(found.dropped)
    if not layout.dropped:
        assert not found.dropped
    exact = name != "dinov2-registers"  # in that layout a position is added to a token and subtracted again
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("name", FLAT)
def test_safetensors_and_pickles_are_read_alike(name, networks, tmp_path):
    path = checkpoints.write(LAYOUTS[name], networks[name], tmp_path / "checkpoint.safetensors")
    loaded, _ = loading.load_source(LAYOUTS[name].source, path, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), networks[name](IMAGES), rtol=1e-5, atol=1e-5)


def test_half_precision_is_read_in_float32(networks, tmp_path):
    def halve(state):
        state.update({key: value.half() for key, value in state.items()})

    path = checkpoints.write(LAYOUTS["timm"], networks["timm"], tmp_path / "half.safetensors", halve)
    loaded, _ = loading.load_source(LAYOUTS["timm"].source, path, SIZE)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.cls_token, networks["timm"].cls_token.half().float())


# --- spoiled -------------------------------------------------------------------------------------------------------


def drop(state):
    for key in ("blocks.1.norm1.weight", "blocks.1.norm1.bias", "norm.weight", "fc_norm.weight"):
        state.pop(key, None)


def add(state):
    state["blocks.1.attn.extra"] = torch.ones(3)


def reshape(state):
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"][:-1]


def poison(state):
    state["blocks.1.mlp.fc2.bias"][3] = float("nan")
    state["blocks.0.mlp.fc2.weight"][0, 0] = float("inf")


def count(state):
    state["blocks.1.norm2.weight"] = torch.ones(48, dtype=torch.long)


def inflate(state):
    state["blocks.1.norm2.weight"] = torch.ones(1).expand(48)


SPOILED = {
    drop: "missing: blocks.1.norm1.weight, blocks.1.norm1.bias, ",
    add: "left over: blocks.1.attn.extra",
    reshape: "of another shape: blocks.0.mlp.fc1.weight (191 x 48 in the file, 192 x 48 in the network)",
    poison: "NaN or infinite values in blocks.0.mlp.fc2.weight, blocks.1.mlp.fc2.bias",
    count: "no plain weights: blocks.1.norm2.weight (int64)",
    inflate: "no plain weights: blocks.1.norm2.weight (fewer values in the file than its shape says)",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_mismatches_are_refused_by_key(name, spoil, networks, tmp_path):
    path = checkpoints.write(LAYOUTS[name], networks[name], tmp_path / "checkpoint.pth", spoil)
    with pytest.raises(WeightsError) as fault:
        loading.load_source(LAYOUTS[name].source, path, SIZE)
    said = str(fault.value)
    assert said.startswith(f"{path} does not fit {LAYOUTS[name].source.name}: ")
    assert SPOILED[spoil] in said
    assert "\n" not in said


def test_long_lists_of_keys_are_counted(networks, tmp_path):
    def lose(state):
        for key in [key for key in state if key.startswith("blocks.1.")]:
            del state[key]

    path = checkpoints.write(LAYOUTS["timm"], networks["timm"], tmp_path / "checkpoint.pth", lose)
    with pytest.raises(WeightsError, match=r"missing: (blocks\.1\.\S+,? ){4,}and \d+ more$"):
        loading.load_source(LAYOUTS["timm"].source, path, SIZE)


@pytest.mark.parametrize("contents", [{}, {"model": {"fc.weight": torch.ones(2)}}, {"state_dict": 3, "epoch": 4}])
def test_a_file_without_a_vit_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: no ViT is in the file"):
        loading.load_source(VIT, tmp_path / "x.pth", SIZE)


def test_a_row_accepts_only_its_own_layout(networks, tmp_path):
    path = checkpoints.write(LAYOUTS["dino"], networks["dino"], tmp_path / "checkpoint.pth")
    only = replace(VIT, formats=("mocov3",))
    with pytest.raises(WeightsError, match=r"has the key layout 'dino', and small is published as 'mocov3'"):
        loading.load_source(only, path, SIZE)


def test_of_two_networks_the_documented_one_is_used(networks):
    state = networks["dino"].state_dict()
    for write, kept in ((checkpoints.mocov3, "module.base_encoder."), (checkpoints.dino, "backbone.")):
        found = formats.convert(write(state))
        assert kept in found.branch
        assert all(torch.equal(found.state[key], value) for key, value in state.items())


# --- resampled to another resolution -------------------------------------------------------------------------------

RESAMPLED = ("timm", "timm-siglip", "timm-registers", "beit-fine-tuned", "deit3", "dinov2")
LARGER, SMALLER = SIZE + 32, SIZE - 32


@pytest.mark.parametrize("size", [LARGER, SMALLER])
@pytest.mark.parametrize("name", RESAMPLED)
def test_another_resolution_is_resampled_like_timm(name, size, networks, tmp_path):
    layout, model = LAYOUTS[name], networks[name]
    path = checkpoints.write(layout, model, tmp_path / "checkpoint.pth")
    loaded, _ = loading.load_source(layout.source, path, size)
    theirs = architectures.build(layout.source, size, meta=False).eval()
    module = beit if isinstance(theirs, beit.Beit) else vision_transformer
    theirs.load_state_dict(module.checkpoint_filter_fn(dict(model.state_dict()), theirs))
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded(images), theirs(images))


def test_the_class_tokens_position_is_not_resampled(networks, tmp_path):
    path = checkpoints.write(LAYOUTS["timm"], networks["timm"], tmp_path / "checkpoint.pth")
    loaded, _ = loading.load_source(LAYOUTS["timm"].source, path, LARGER)
    own = networks["timm"].pos_embed
    assert loaded.pos_embed.shape[1] == 1 + (LARGER // 16) ** 2
    assert torch.equal(loaded.pos_embed[:, :1], own[:, :1])
    assert torch.equal(loaded.pos_embed, resample_abs_pos_embed(own, [LARGER // 16] * 2))


@pytest.mark.parametrize("rows", [16, 18, 1])
def test_positions_of_no_square_grid_are_refused(rows, networks, tmp_path):
    def cut(state):
        state["pos_embed"] = torch.ones(1, rows, 48)

    path = checkpoints.write(LAYOUTS["timm"], networks["timm"], tmp_path / "checkpoint.pth", cut)
    with pytest.raises(WeightsError, match=rf"of another shape: pos_embed \(1 x {rows} x 48 in the file"):
        loading.load_source(LAYOUTS["timm"].source, path, SIZE)
