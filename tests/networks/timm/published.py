"""Published networks, two blocks of each, with weights away from their initial values."""

import copy
from functools import cache

import timm
import torch
from torch import nn

from atdiag.networks.model.vit import ViT
from atdiag.networks.registry import teachers
from atdiag.networks.timm import conversion, flexible
from atdiag.networks.timm.wrapping import Foreign


def narrow(row: teachers.TeacherEntry) -> dict:
    """Return arguments that keep three heads of a large network, at their width: tests don't depend on the number."""
    if row.size == "s":
        return {}
    return {"num_heads": 3, "embed_dim": 3 * row.width // row.heads}


# Every row of the registry -> timm's name, arguments, and what inspection must find. (Sizes and heads of the whole
# networks are compared with timm's in test_teachers.)
FAMILIES: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    row.name: (row.model, {**row.arguments, **narrow(row)}, row.components or ())
    for row in teachers.registry().values()
}


PLAIN: tuple[str, ...] = ()


BEIT = ("layer_scale", "mean_pool", "no_abs_pos", "no_k_bias", "rel_pos_bias")


SMALL = {"embed_dim": 96, "num_heads": 3, "num_classes": 5}


OTHERS: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "eva giant": ("eva_giant_patch14_224", {"embed_dim": 176, "num_heads": 2}, ("mean_pool", "no_k_bias")),
    "mean and registers, no class token": (
        "vit_medium_patch16_reg4_gap_256",
        SMALL,
        ("layer_scale", "registers"),
    ),
    "registers with positions": (
        "vit_small_patch14_reg4_dinov2",
        SMALL | {"no_embed_class": False},
        FAMILIES["dinov2_reg_s"][2],
    ),
    "one table for all blocks": (
        "beit_base_patch16_224",
        SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
        ("layer_scale", "mean_pool", "no_k_bias", "rel_pos_bias"),
    ),
    "both kinds of tables": ("beit_base_patch16_224", SMALL | {"use_shared_rel_pos_bias": True}, BEIT),
    "the class token of a beit": (
        "beit_base_patch16_224",
        SMALL | {"global_pool": "token"},
        tuple(name for name in BEIT if name != "mean_pool"),
    ),
    "a norm after the class token": ("deit_small_patch16_224", SMALL | {"fc_norm": True}, PLAIN),
    "separate projections": ("eva_giant_patch14_224", SMALL | {"qkv_fused": False}, ("mean_pool", "no_k_bias")),
    "all biases, separate": (
        "eva_giant_patch14_224",
        SMALL | {"qkv_fused": False, "attn_type": "rope"},
        ("mean_pool",),
    ),
    "a mean beside a class token": ("vit_small_patch16_224", SMALL | {"global_pool": "avg"}, ("mean_pool",)),
    "images of another size": ("vit_small_patch16_224", SMALL | {"dynamic_img_size": True}, PLAIN),
}


MODERN: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "eva02": ("eva02_small_patch14_224", {}, ("mean_pool", "no_k_bias", "rope", "swiglu")),
    "eva02 clip": (
        "eva02_base_patch16_clip_224",
        SMALL,
        ("attn_norm", "mlp_norm", "no_k_bias", "rope", "swiglu"),
    ),
    "dinov3": (
        "vit_small_patch16_dinov3",
        {},
        (
            *("layer_scale", "ln_eps", "mean_pool", "no_abs_pos", "no_qkv_bias", "norm_before_pool", "registers"),
            "rope",
        ),
    ),
    "distilled deit": ("deit_small_distilled_patch16_224", SMALL, ("distillation_token",)),
    "mixed rope": ("vit_base_patch16_rope_mixed_224", SMALL, ("layer_scale", "no_abs_pos", "rope")),
    "beit3": ("beit3_base_patch16_224", SMALL, ("attn_norm", "ln_eps", "mean_pool", "mlp_norm")),
    "post norm": ("vit_base_patch16_rpn_224", SMALL, ("no_qkv_bias", "post_norm")),
    "siglip so400m": ("vit_so400m_patch16_siglip_256", SMALL, ("attention_pool", "gelu_tanh")),
    "beit with swiglu": ("beit_base_patch16_224", SMALL | {"swiglu_mlp": True}, (*BEIT, "swiglu")),
    "a mean of normed tokens": ("vit_base_patch16_siglip_gap_224", SMALL, ("norm_before_pool",)),
    "sapiens": (
        "vit_base_patch16_sapiens2",
        SMALL | {"img_size": 64, "num_kv_heads": (3, 3)},
        ("layer_scale", "no_abs_pos", "qk_norm", "registers", "rms_norm", "rope", "swiglu"),
    ),
    "aimv2": (
        "aimv2_large_patch14_224",
        SMALL,
        ("no_proj_bias", "no_qkv_bias", "norm_before_pool", "patch_norm", "rms_norm", "swiglu"),
    ),
}


FOREIGN: dict[str, tuple[str, dict, set[str]]] = {
    "parallel": ("vit_base_patch16_xp_224", SMALL, {"parallel_blocks", "qk_norm"}),
    "grouped": (
        "vit_base_patch16_sapiens2",
        SMALL | {"num_heads": 4, "num_kv_heads": (4, 2), "img_size": 64},
        {"grouped_queries", "uneven_blocks"},
    ),
}


FLEXIBLE: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "naflex": ("naflexvit_base_patch16_par_gap", SMALL, ("layer_scale", "registers")),
    "naflex, factorized": ("naflexvit_base_patch16_parfac_gap", SMALL, ("layer_scale", "registers")),
    "naflex siglip": ("naflexvit_base_patch16_siglip", SMALL, ("attention_pool", "gelu_tanh")),
    "radio": ("naflexvit_base_patch16_radio_v3", SMALL, ("layer_scale", "no_last_norm", "registers")),
}
"""Networks for images of any size, each as the plain ViT that it is at one."""


OTHERS |= MODERN | FLEXIBLE
OURS = [*FAMILIES, *OTHERS]


@cache
def model(name: str) -> nn.Module:
    """Return a network of the tables above, in eval mode. Shared between tests: do not modify it."""
    return build(name)


def build(name: str) -> nn.Module:
    """Build a network of the tables above, with every parameter away from its initial value."""
    made = as_timm_builds(name)
    if not flexible.is_flexible(made):
        return made
    return flexible.plain(made, 64).requires_grad_(False)


def as_timm_builds(name: str) -> nn.Module:
    """Build a network of the tables above of timm's class."""
    timms, options, _ = (FAMILIES | OTHERS | FOREIGN)[name]
    side = 4 * (14 if "patch14" in timms else 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = timm.create_model(timms, pretrained=False, **({"img_size": side, "depth": 2} | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.2 if parameter.ndim == 1 or parameter.shape[0] == 1 else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        for table in (p for n, p in made.named_parameters() if "relative_position_bias_table" in n):
            torch.nn.init.normal_(table, generator=generator)
    return made.eval().requires_grad_(False)


def images(side: int) -> torch.Tensor:
    """Two images in [0, 1]."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def normalised(x: torch.Tensor, of: nn.Module) -> torch.Tensor:
    """Normalise images as timm's network expects."""
    mean, std = (torch.tensor(of.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


@cache
def teacher(name: str) -> ViT | Foreign:
    return conversion.teacher_from(copy.deepcopy(model(name)))
