"""timm's NaFlexVit, whose images may have any size, as the plain ViT that it is at one size.

Given a batch of square images, it embeds patches by one linear layer, adds position embeddings resampled to their grid,
and runs the blocks of the plain ViT. So :func:`plain` puts its own modules into timm's ``VisionTransformer``: the same
function of images of that size (Dehghani et al. 2023, Patch n' Pack).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, PatchEmbed
from timm.models import naflexvit, vision_transformer
from torch import Tensor, nn

from atdiag.core.errors import UserError

_MODULES = ("norm_pre", "blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head")
"""What both classes have under the same name and use in the same way."""


def is_flexible(model: nn.Module) -> bool:
    """Return whether a network is timm's NaFlexVit."""
    return type(model) is naflexvit.NaFlexVit


@torch.no_grad()
def plain(model: Any, image_size: int) -> vision_transformer.VisionTransformer:
    """Return the plain ViT that a NaFlexVit is for square images of a size in pixels, of its own modules.

    Position embeddings are resampled by timm's own method. Works on the meta device, too. Raises UserError, with the
    reason, for options that the plain ViT lacks.
    """
    if reason := _why_not(model):
        raise UserError(f"NaFlexVit can't be a teacher: {reason}")
    embeds = model.embeds
    like: dict[str, Any] = {"device": embeds.proj.weight.device, "dtype": embeds.proj.weight.dtype}
    side = embeds.patch_size[0]
    vit = vision_transformer.VisionTransformer(
        img_size=image_size,
        patch_size=side,
        in_chans=embeds.in_chans,
        num_classes=0,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        depth=0,
        num_heads=1,
        class_token=model.has_class_token,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=True,
        pos_embed="none",
        pool_include_prefix=getattr(model, "pool_include_prefix", False),  # newer than timm 1.0.27
        fc_norm=False,
        **like,
    )
    vit.patch_embed = PatchEmbed(
        image_size, side, embeds.in_chans, model.embed_dim, bias=embeds.proj.bias is not None, **like
    )
    vit.patch_embed.proj.weight = nn.Parameter(_filters(embeds))
    if embeds.proj.bias is not None:
        vit.patch_embed.proj.bias = embeds.proj.bias
    vit.patch_embed.norm = embeds.norm
    vit.cls_token, vit.reg_token = embeds.cls_token, embeds.reg_token
    if embeds.pos_embed_type != "none":
        vit.pos_embed = nn.Parameter(_positions(embeds, image_size // side))
    for name in _MODULES:
        setattr(vit, name, getattr(model, name))
    vit.num_classes, vit.pretrained_cfg = model.num_classes, model.pretrained_cfg
    return vit.train(model.training)


def _why_not(model: Any) -> str | None:
    """Return which of a NaFlexVit's options the plain ViT lacks; None if none."""
    if model.rope is not None or not all(
        type(block) is vision_transformer.Block and type(block.attn) is Attention for block in model.blocks
    ):
        return f"its blocks ({type(model.blocks[0]).__name__}) are not those of the plain ViT"
    if model.embeds.norm_input is not None or len(set(model.embeds.patch_size)) > 1:
        return "its pixels are normed before they are embedded, or its patches are not square"
    return None


def _filters(embeds: Any) -> Tensor:
    """Return the embedding of a patch as filters [C, channels, P, P]."""
    weight: Tensor = embeds.proj.weight
    if not embeds.is_linear:
        return weight
    side, channels = embeds.patch_size[0], embeds.in_chans
    if getattr(embeds, "channels_last", True):  # of a patch's pixels; an option that is newer than timm 1.0.27
        return weight.view(-1, side, side, channels).permute(0, 3, 1, 2).contiguous()
    return weight.view(-1, channels, side, side)


def _positions(embeds: Any, grid: int) -> Tensor:
    """Return what is added to the patches of a grid, [1, grid * grid, C]."""
    added: Tensor = embeds.proj.weight.new_zeros(1, grid**2, embeds.embed_dim)
    if embeds.pos_embed_type == "factorized":
        embeds._apply_factorized_pos_embed(added, grid_size=(grid, grid))
    else:
        embeds._apply_learned_pos_embed(added, grid_size=(grid, grid))
    return added
