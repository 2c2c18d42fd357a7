"""Networks for images of any size as the plain ViTs that they are at one: the same function, from a file, or refused.

That they teach like every other network: test_conversion.py.
"""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from atdiag.core.errors import UserError
from atdiag.networks.registry import teachers
from atdiag.networks.timm import flexible, inspection
from atdiag.networks.weights import loading
from tests.networks.timm.published import FLEXIBLE, SMALL, as_timm_builds, images, normalised
from tests.networks.timm.test_conversion import maps_by_hooks

MODEL = "naflexvit_base_patch16_par_gap"


@pytest.mark.parametrize("name", FLEXIBLE)
@pytest.mark.parametrize("side", [64, 80])
@torch.no_grad()
def test_it_is_the_same_function_of_images_of_one_size(name, side):
    of, x = as_timm_builds(name), images(side)
    expected, maps = of(normalised(x, of)), maps_by_hooks(of, x)
    plain = flexible.plain(as_timm_builds(name), side)
    assert type(plain) is VisionTransformer and plain.training is of.training is False
    assert (plain(normalised(x, of)) - expected).abs().max() < 1e-5 * expected.abs().max()
    for one, other in zip(maps_by_hooks(plain, x), maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_either_order_of_a_patchs_pixels_and_a_convolution(channels_last):
    for kind in ("linear", "conv"):
        torch.manual_seed(0)
        of = timm.create_model(
            MODEL, img_size=64, depth=1, patchify_channels_last=channels_last, embed_proj_type=kind, **SMALL
        ).eval()
        x = torch.rand(2, 3, 64, 64)
        expected = of(x)
        assert (flexible.plain(of, 64)(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_teacher_from_a_file_at_two_sizes(tmp_path, monkeypatch):
    """Its weights are timm's, under any prefix; the positions are resampled to each size by timm's own method."""
    small = {**SMALL, "num_classes": 1000, "depth": 2}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **{**small, **given}))
    torch.manual_seed(0)
    of = create(MODEL, img_size=64, **small).eval()
    for parameter in of.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    file = tmp_path / "naflex.safetensors"
    save_file({f"module.{name}": tensor.clone() for name, tensor in of.state_dict().items()}, file)
    for side in (64, 96):
        spec = teachers.teacher(f"timm:{MODEL}@{file}", "small", side)
        assert (spec.network.image_size, spec.network.grid, spec.network.registers) == (side, side // 16, 4)
        assert spec.network.differences == ()
        found, x = loading.load(spec), images(side)
        expected = of(normalised(x, of))
        assert (found(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(UserError, match=r"NaFlexVit, and does not say which .*: type timm:naflexvit_base_patch16_gap@"):
        teachers.canonical(str(file))
    (named := tmp_path / f"{MODEL}.safetensors").write_bytes(file.read_bytes())
    assert teachers.canonical(str(named)) == f"timm:{MODEL}@{named}"
    state = {name: tensor.clone() for name, tensor in of.state_dict().items() if name != "embeds.pos_embed"}
    save_file(state, file)
    with pytest.raises(UserError, match=r"does not fit .*missing: embeds\.pos_embed"):
        loading.load(teachers.teacher(f"timm:{MODEL}@{file}", "small", 64))


def test_what_can_not_be_plain_is_refused():
    rotary = timm.create_model(MODEL, img_size=64, depth=1, rope_type="axial", **SMALL)
    with pytest.raises(UserError, match=r"its blocks \(EvaBlock\) are not those of the plain ViT"):
        flexible.plain(rotary, 64)
    assert "as timm:MODEL@FILE it is the plain ViT" in inspection.why_not(as_timm_builds("naflex"))
    with pytest.raises(UserError, match=r"100 px is not a multiple of that: add `data.image_size`=96, or 112"):
        teachers.teacher(f"timm:{MODEL}", "small", 100)
    windows = timm.create_model("samvit_base_patch16", img_size=64, embed_dim=96, depth=2, num_heads=3)
    assert "attend within windows" in inspection.why_not(windows)
