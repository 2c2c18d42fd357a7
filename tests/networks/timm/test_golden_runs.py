"""Runs with modern teachers, whose rotary positions and the like were once differences, keep their ids."""

import pytest
import torch
from timm.models import deit, eva, vision_transformer

from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Teacher, Transfer
from atdiag.networks.timm import inspection

PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def built(make, **options) -> Network:
    with torch.device("meta"):
        return inspection.describe(make(**SMALL, **options), **PIXELS)


def dinov3() -> Network:
    """Return a network like DINOv3's, with the constructor arguments of timm's ``vit_small_patch16_dinov3``."""
    return built(
        eva.Eva,
        qkv_bias=False,
        init_values=1e-5,
        rope_type="dinov3",
        rope_temperature=100,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_rotate_half=True,
        use_fc_norm=False,
        num_reg_tokens=4,
        norm_layer=lambda width, **kw: torch.nn.LayerNorm(width, eps=1e-5, **kw),
    )


def eva02() -> Network:
    """Return a network like EVA-02's, with the constructor arguments of timm's ``eva02_base_patch14_224``."""
    return built(
        eva.Eva,
        qkv_fused=False,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        use_post_transformer_norm=True,
        use_fc_norm=False,
        global_pool="token",
    )


def eva02_clip() -> Network:
    """Return a network like EVA-02-CLIP's, with ``timm``'s arguments of ``eva02_base_patch16_clip_224``."""
    return built(
        eva.Eva,
        qkv_fused=False,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        global_pool="token",
    )


def perception_encoder() -> Network:
    """Return a network like the Perception Encoder's, with ``vit_pe_core_base_patch16_224``'s arguments."""
    return built(
        eva.Eva,
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(14, 14),
        rope_grid_offset=1.0,
        rope_grid_indexing="xy",
        attn_pool_num_heads=4,
        attn_pool_mlp_ratio=4.0,
        norm_layer=lambda width, **kw: torch.nn.LayerNorm(width, eps=1e-5, **kw),
    )


def siglip_gap() -> Network:
    """Return a network like SigLIP's with mean pooling, whose last norm comes before it."""
    return built(
        vision_transformer.VisionTransformer, class_token=False, global_pool="avg", fc_norm=False, act_layer="gelu_tanh"
    )


def aimv2() -> Network:
    """Return a network like AIMv2's: RMSNorm, SwiGLU, no biases, a norm of the embedded patches."""
    from timm.layers import RmsNorm, SwiGLU

    return built(
        vision_transformer.VisionTransformer,
        class_token=False,
        fc_norm=False,
        mlp_ratio=2.75,
        global_pool="avg",
        qkv_bias=False,
        proj_bias=False,
        act_layer="silu",
        norm_layer=lambda width, **kw: RmsNorm(width, eps=1e-5, **kw),
        embed_norm_layer=lambda width, **kw: RmsNorm(width, eps=1e-5, **kw),
        mlp_layer=SwiGLU,
    )


def deit_distilled() -> Network:
    return built(deit.VisionTransformerDistilled)


def post_norm() -> Network:
    return built(vision_transformer.VisionTransformer, qkv_bias=False, block_fn=vision_transformer.ResPostBlock)


def sapiens2() -> Network:
    """Return a network like Sapiens2's base: RMSNorm of queries and keys, LayerScale on the attention alone."""
    from timm.layers import RmsNorm

    return built(
        eva.Eva,
        attn_type="rope",
        qkv_fused=False,
        qk_norm=True,
        swiglu_mlp=True,
        swiglu_align_to=8,
        init_values=1e-4,
        attn_only_layer_scale=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        num_reg_tokens=4,
        norm_layer=lambda width, **kw: RmsNorm(width, eps=1e-6, **kw),
    )


def ids(network: Network) -> tuple[str, str, str, str]:
    """Return the ids of four runs: from scratch, copy, distill, and copy into a student with the old components."""
    rest = {"data": Data(train=64, image_size=32), "recipe": Recipe(epochs=1), "seed": Seed(data=0, model=0)}
    rest["teacher"] = Teacher(name="timm:modern", profile="small", network=network, sha256="a" * 64)
    old = tuple(name for name in network.components if name in OLD)
    copy = Transfer(method="copy", layers=(0, 1))
    distill = Transfer(method="distill", layers=(0, 1), weight=3.0)
    return tuple(
        RunSpec(network=network.student(parts), transfer=transfer, **rest).id
        for parts, transfer in (((), Transfer()), ((), copy), ((), distill), (old, copy))
    )


OLD = {"ln_eps", "mean_pool", "no_abs_pos", "no_k_bias", "no_patch_bias", "pre_norm", "quick_gelu", "rel_pos_bias"}
"""The components that there were when the ids were taken, and that a student of such a teacher has unchanged."""

GOLDEN = {
    dinov3: ("d5b0496b00d3151a", "70257a32b9095dae", "979cc3d3c2ee5a0a", "850052be10d88a09"),
    eva02: ("d5b0496b00d3151a", "e43350137bd3d0d9", "0b71fd4e8e0e7474", "f357716163c29af6"),
    eva02_clip: ("d5b0496b00d3151a", "1da9deeb17d22a80", "b3fa77b4dde35746", "550a4069391d3be2"),
    perception_encoder: ("d5b0496b00d3151a", "516620c27d262de1", "2988ff6d0593581a", "594baa5a8826c6ac"),
    siglip_gap: ("586d634cba13dcd8", "43dad53ddc936177", "776ef14cf3de27eb", "43dad53ddc936177"),
    aimv2: ("5ad80fe5e3601d1b", "8f9117f06a39e52f", "0bbe3f61a7c021af", "8f9117f06a39e52f"),
    deit_distilled: ("d5b0496b00d3151a", "b3d71056eca666d3", "ccf3f47acfbf4a9c", "b3d71056eca666d3"),
    post_norm: ("d5b0496b00d3151a", "91c44024f80d2d23", "d1ecfbd1d7e35649", "91c44024f80d2d23"),
    sapiens2: ("a6ecedd15af17478", "b75d5cc4db24f3b2", "a241fb0dbab33407", "24af3104eaf6bbdd"),
}


@pytest.mark.parametrize("make", GOLDEN, ids=lambda make: make.__name__)
def test_old_runs_with_modern_teachers_are_found(make):
    # A change here orphans run directories: what was a difference of the teacher must hash as it did.
    assert ids(make()) == GOLDEN[make]
