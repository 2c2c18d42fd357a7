"""Inspection of published networks: their description, or a refusal with the reason."""

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.core.spec.network import EXCLUSIVE
from atdiag.networks.model import components, students
from atdiag.networks.timm import conversion, inspection
from tests.networks.timm.published import FAMILIES, FOREIGN, OTHERS, OURS, model


# Descriptions
@pytest.mark.parametrize("name", OURS)
def test_inspection_finds_a_networks_components(name):
    of, network = model(name), conversion.describe(model(name))
    assert network.components == tuple(sorted((FAMILIES | OTHERS)[name][2])) and not network.differences
    heads = [block.attn.num_heads for block in of.blocks]
    assert (network.depth, network.width, network.heads) == (len(heads), of.embed_dim, heads[0])
    assert network.grid**2 == of.patch_embed.num_patches
    assert network.tokens == of.forward_features(torch.zeros(1, 3, network.image_size, network.image_size)).shape[1]
    assert network.classes == (of.head.out_features if isinstance(of.head, nn.Linear) else 1)
    assert network.layer_scale_init in (None, 1.0, 0.1, 1e-5, 1e-6)  # initial values, not those learned since


@pytest.mark.parametrize("name", FOREIGN)
def test_differences_that_no_student_can_have_are_named(name):
    network = conversion.describe(model(name))
    assert set(network.differences) == FOREIGN[name][2]
    with pytest.raises(ValueError, match="no ViT of ours computes the same function"):
        conversion.convert(model(name), network)
    assert not network.student(network.components).differences


def test_a_gated_mlp_is_matched_by_a_plain_one_with_as_many_weights():
    network = conversion.describe(model("eva02"))
    mlps = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (model("eva02").blocks[0].mlp,)]
    assert mlps == [2 * network.width * int(network.width * network.mlp_ratio)] and network.mlp_ratio == 4


@pytest.mark.parametrize(("width", "hidden"), [(1408, 6144), (1152, 4304), (768, 2730), (10, 3)])
def test_the_ratio_gives_the_width_of_the_mlp_back(width, hidden):
    assert int(width * inspection.ratio(hidden, width)) == hidden


NAMES = sorted(name for name, component in components.COMPONENTS.items() if not component.followed)


@given(names=st.sets(st.sampled_from(NAMES)), class_token=st.booleans(), channels=st.sampled_from([1, 3]))
def test_our_own_network_gets_its_own_description_back(names, class_token, channels):
    assume(not any({one, other} <= names for one, other, _ in EXCLUSIVE))
    if not class_token:
        names -= {"mean_pool", "distillation_token"}
    if class_token and ("mean_pool" not in names or "attention_pool" in names):
        names -= {"norm_before_pool"}  # which then does nothing
    if "attention_pool" in names:
        names -= {"norm_before_pool"}
    network = Network(
        image_size=12,
        patch_size=4,
        channels=channels,
        width=24,
        depth=2,
        heads=3,
        mlp_ratio=2.5,
        class_token=class_token,
        classes=5,
        norm_eps=1e-3 if "ln_eps" in names else 1e-6,
        mean=(0.1, 0.2, 0.3)[:channels],
        std=(1.0, 2.0, 4.0)[:channels],
        components=tuple(names),
        layer_scale_init=0.3 if "layer_scale" in names else None,
        registers=3 if "registers" in names else int("distillation_token" in names),
    )
    assert conversion.describe(students.build(network, 0)) == network


def test_normalisation_is_taken_from_timms_configuration_or_given():
    assert conversion.describe(model("clip_b")).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert conversion.describe(model("clip_b"), mean=(0.5,), std=(0.2, 0.2, 0.2)).std == (0.2,)
    bare = VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=2)
    with pytest.raises(
        UserError, match=r"mean.*is not known: give mean= and std=, .* or set network.pretrained_cfg = .*\* 3"
    ):
        conversion.describe(bare)
    assert conversion.describe(bare, (0.5,), (0.5,)).tokens == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "no self-attention"),
        ("convnext_atto", "no self-attention"),
        ("mixer_s32_224", "no self-attention"),
        ("swin_tiny_patch4_window7_224", "within windows"),
        ("xcit_nano_12_p16_224", "across channels"),
        ("cait_xxs24_224", "talking heads"),
        ("pvt_v2_b0", "from stage to stage"),
        ("vit_small_patch16_18x2_224", r"its blocks \(ParallelThingsBlock\)"),
        ("convit_tiny", "not one of timm's classes"),
    ],
)
def test_other_networks_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        made = timm.create_model(name, pretrained=False)
    with pytest.raises(UserError, match=rf"{type(made).__name__} can't be a teacher: .*{reason}"):
        conversion.teacher_from(made)


def test_a_subclass_is_refused_because_its_parts_do_not_show_what_it_changes():
    class Mine(VisionTransformer):
        pass

    with pytest.raises(UserError, match="Mine can't be a teacher"):
        conversion.describe(Mine(img_size=32, embed_dim=12, depth=1, num_heads=2), (0.5,), (0.5,))


@pytest.mark.parametrize("options", [{"img_size": (32, 64)}, {"img_size": 32, "patch_size": (8, 16)}, {"img_size": 50}])
def test_only_square_grids_that_fit_are_taken(options):
    bare = VisionTransformer(embed_dim=12, depth=1, num_heads=2, **options)
    with pytest.raises(UserError, match=r"not square|not a multiple"):
        conversion.describe(bare, (0.5,), (0.5,))


def test_blocks_that_differ_are_a_difference():
    bare = VisionTransformer(img_size=32, embed_dim=12, depth=2, num_heads=2)
    bare.blocks[1].mlp.act = nn.ReLU()
    assert conversion.describe(bare, (0.5,), (0.5,)).differences == ("relu", "uneven_blocks")
    bare.blocks[1].mlp.act, bare.blocks[1].norm1.eps = nn.GELU(), 1e-3
    assert conversion.describe(bare, (0.5,), (0.5,)).differences == ("uneven_ln_eps",)
