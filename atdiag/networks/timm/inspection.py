"""Inspect a network built by timm to find its architecture, from its modules and never from its name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from timm.layers import Attention as TimmAttention
from timm.layers import DropPath, GluMlp, HybridEmbed, Mlp, PatchEmbed, RmsNorm, SwiGLU
from timm.layers.attention import AttentionRope
from timm.models import beit, deit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from atdiag.core.errors import UserError
from atdiag.core.spec import PLAIN_NORM_EPS, Network
from atdiag.networks.model import components, readout
from atdiag.networks.model.around_the_map import POST_NORM as POST_NORM
from atdiag.networks.model.blocks import Block
from atdiag.networks.model.component import is_there as _is_there
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm import flexible
from atdiag.transfer.attention import Attention

_NETWORKS = (
    ViT,
    vision_transformer.VisionTransformer,
    deit.VisionTransformerDistilled,
    beit.Beit,
    eva.Eva,
    vision_transformer_relpos.VisionTransformerRelPos,
)
"""Exactly these classes are supported: a subclass may change what its parts can't show."""

_RELPOS = vision_transformer_relpos
BLOCKS = (Block, vision_transformer.Block, beit.Block, eva.EvaBlock, _RELPOS.RelPosBlock)
PARALLEL = (vision_transformer.ParallelScalingBlock,)
ATTENTION = (Attention, TimmAttention, AttentionRope, beit.Attention, eva.EvaAttention, _RELPOS.RelPosAttention)

_ATTENTION_NAMES = ("attention", "attn", "mhsa", "gpsa", "xca", "litemla")
"""Lower-case fragments of timm's names for modules that attend."""

_OTHER_ATTENTION = (
    ("window", "its attention stays within windows, so it has no map over all tokens"),
    ("shifted", "its attention stays within windows, so it has no map over all tokens"),
    ("xca", "its attention runs across channels (cross-covariance), not across tokens"),
    ("talkinghead", "its heads are mixed before and after softmax (talking heads), so no head has a map of its own"),
    ("linearattention", "its attention has no softmax"),
    ("litemla", "its attention has no softmax"),
)
"""Lower-case fragment of an attention module's class name -> why such a network can't teach."""


def describe(model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Network:
    """Return the architecture of a network, by inspection.

    mean, std: per-channel normalisation of its input; default: those in timm's configuration of the model.

    ``Network.differences`` lists other departures from the plain ViT that students can't be given
    (``parallel_blocks``, ``grouped_queries`` ...), without those that one of its components explains
    (``Component.explains``). Notes on what a ``Network`` has no direct field for:

    - classes: rows of the head, 1 if it has none.
    - mlp_ratio: for a gated MLP (SwiGLU, with three matrices), that of the plain MLP with as many weights.
    - DeiT's distillation token counts among the registers: it takes part in attention and belongs to no patch.

    Raises UserError, with the reason, for a network that is not a ViT with softmax attention over all of its tokens.
    """
    if reason := why_not(model):
        raise UserError(f"{type(model).__name__} can't be a teacher: {reason}")
    return _describe(model, mean, std)


def _describe(model: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> Network:
    facts = [_block_facts(block) for block in model.blocks]
    heads, hidden, _ = facts[0]
    differences = {name for _, _, names in facts for name in names} | set(_network_differences(model))
    if len(set(facts)) > 1 or len({_unlike(block) for block in model.blocks}) > 1:
        differences.add("uneven_blocks")
    found = components.inspect(model)
    differences -= {name for part in components.resolve(found) for name in part.explains}
    patch = model.patch_embed
    side, grid = patch.img_size[0], patch.grid_size[0]
    norms = components.layer_norms(model.blocks[0])
    return Network(
        image_size=side,
        patch_size=side // grid if isinstance(patch, HybridEmbed) else patch.patch_size[0],
        channels=patch.proj.in_channels if isinstance(patch, PatchEmbed) else _channels(model),
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=heads,
        mlp_ratio=ratio(hidden, model.embed_dim),
        class_token=model.cls_token is not None,
        classes=model.head.out_features if isinstance(model.head, nn.Linear) else 1,
        norm_eps=norms[0].eps if norms else PLAIN_NORM_EPS,
        mean=_channel_values(model, "mean", mean),
        std=_channel_values(model, "std", std),
        components=found,
        layer_scale_init=_scale_init(model.blocks[0]) if "layer_scale" in found else None,
        registers=sum(token.shape[1] for token in _extra_tokens(model)),
        differences=tuple(differences),
        values=components.values(model, found),
    )


def why_not(model: Any) -> str | None:
    """Return why a network can't be a teacher; None if it can."""
    if flexible.is_flexible(model):
        return "its images may have any size; as timm:MODEL@FILE it is the plain ViT that it is at one size"
    if type(model) not in _NETWORKS:
        names = {type(module).__name__ for module in model.modules()}
        attention = {name for name in names if any(part in name.lower() for part in _ATTENTION_NAMES)}
        if not attention:
            return "it has no self-attention that atdiag can find"
        for part, reason in _OTHER_ATTENTION:
            if any(part in name.lower() for name in attention):
                return reason
        if any(getattr(block, "window_size", 0) for block in getattr(model, "blocks", ())):
            return "most of its blocks attend within windows, so they have no map over all tokens"
        if any(hasattr(model, name) for name in ("stages", "layers", "downsample")):
            return "its tokens change in number from stage to stage, so it has no one token grid"
        known = ", ".join(kind.__name__ for kind in _NETWORKS[1:])
        return f"it is not one of timm's classes whose maps atdiag can read ({known})"
    patch = model.patch_embed
    if isinstance(patch, HybridEmbed):
        return _why_no_grid(patch) or _why_no_maps(model)
    if not isinstance(patch, PatchEmbed):
        return f"its patches are embedded by more than one linear layer ({type(patch).__name__})"
    if patch.img_size is None or len(set(patch.img_size)) > 1 or len(set(patch.patch_size)) > 1:
        return "its images or patches are not square"
    if patch.img_size[0] % patch.patch_size[0]:
        return f"its image size {patch.img_size[0]} is not a multiple of its patch size {patch.patch_size[0]}"
    return _why_no_maps(model)


def _why_no_grid(patch: Any) -> str | None:
    """Return why the token grid of a convolutional patch embedding can't be used; None if it can."""
    if patch.img_size is None or len({*patch.img_size, *patch.grid_size}) > 2 or len(set(patch.grid_size)) > 1:
        return "its images or patches are not square"
    if patch.img_size[0] % patch.grid_size[0]:
        return f"its image size {patch.img_size[0]} is not a multiple of its grid of {patch.grid_size[0]} tokens"
    return None


def _why_no_maps(model: Any) -> str | None:
    for block in model.blocks:
        if not isinstance(block, BLOCKS + POST_NORM + PARALLEL):
            return f"its blocks ({type(block).__name__}) are not of a kind whose maps atdiag can read"
        if not isinstance(block, PARALLEL) and not isinstance(block.attn, ATTENTION):
            return f"its attention ({type(block.attn).__name__}) has no single softmax map for each head"
    return None


def _block_facts(block: Any) -> tuple[int, int, frozenset[str]]:
    """Return a block's heads, MLP width (of an equivalent plain MLP) and differences; usually equal for all blocks."""
    differences: set[str] = set()
    if isinstance(block, PARALLEL):  # attention and MLP share one projection instead of being separate modules
        if not isinstance(block.q_norm, nn.Identity):
            differences.add("qk_norm")
        return int(block.num_heads), int(block.in_split[0]), frozenset(differences | {"parallel_blocks"})
    if isinstance(block, POST_NORM):
        differences.add("post_norm")
    if not all(_is_layer_norm(norm) for norm in (block.norm1, block.norm2)):
        differences.add("no_layer_norm")
    hidden = _inspect_mlp(block.mlp, differences)
    _inspect_attention(block.attn, differences)
    out = getattr(block.mlp, "fc2", None)  # an MLP of another kind has its own names, and is a difference anyway
    if out is not None and (block.attn.proj.bias is None) != (out.bias is None):
        differences.add("no_mlp_bias")
    return int(block.attn.num_heads), hidden, frozenset(differences)


def _unlike(block: Any) -> tuple[Any, ...]:
    """Return what else must be equal in all blocks, since components are looked for in the first."""
    scales = [scale is None for scale in components.branch_scales(block)]
    parts = [type(m) for m in block.modules() if not isinstance(m, DropPath | nn.Identity)]
    return (*scales, *parts, *components.qkv_biases(getattr(block, "attn", block)))


def _inspect_attention(attn: Any, differences: set[str]) -> None:
    width = attn.proj.out_features
    checks: dict[str, bool] = {
        "qk_norm": _is_there(attn, "q_norm") or _is_there(attn, "k_norm"),
        "attn_norm": _is_there(attn, "norm"),
        "gated_attention": _is_there(attn, "gate"),
        "grouped_queries": getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads,
        "wide_heads": attn.proj.in_features != width or width % attn.num_heads != 0,
        "no_qkv_bias": not any(components.qkv_biases(attn)),
        "uneven_qkv_bias": components.qkv_biases(attn) not in [(True,) * 3, (True, False, True), (False,) * 3],
        "no_proj_bias": attn.proj.bias is None,
    }
    differences |= {name for name, found in checks.items() if found}


def _inspect_mlp(mlp: Any, differences: set[str]) -> int:
    """Add an MLP's differences; return its width (that of a plain MLP with as many weights)."""
    if _is_there(mlp, "norm"):
        differences.add("mlp_norm")
    if isinstance(mlp, SwiGLU | GluMlp):
        differences.add("swiglu" if isinstance(mlp.act, nn.SiLU) else "gated_mlp")
        return int(1.5 * mlp.fc2.in_features + 0.5)
    if type(mlp) is not Mlp:
        differences.add(f"{type(mlp).__name__.lower()}_mlp")
        return int(mlp.fc2.in_features) if hasattr(mlp, "fc2") else 4 * _first_width(mlp)
    if mlp.fc1.bias is None or mlp.fc2.bias is None:
        differences.add("no_mlp_bias")
    if activation := _activation(mlp.act):
        differences.add(activation)
    return int(mlp.fc1.out_features)


def _first_width(mlp: nn.Module) -> int:
    return next(int(module.in_features) for module in mlp.modules() if isinstance(module, nn.Linear))


def _activation(act: nn.Module) -> str | None:
    """Return the name of an activation that is neither GELU nor the component quick_gelu."""
    approximate = getattr(act, "approximate", "none")
    kind = type(act).__name__
    if kind == "QuickGELU" or (kind == "GELU" and approximate == "none"):
        return None
    return "gelu_tanh" if kind in ("GELU", "GELUTanh") else kind.lower()


def _network_differences(model: Any) -> Iterator[str]:
    """Yield a network's differences from the plain ViT outside its blocks."""
    if _is_there(model, "rope"):
        yield "rope"
    if isinstance(model.patch_embed, HybridEmbed):
        yield "convolutional_embedding"
    if isinstance(model, _RELPOS.VisionTransformerRelPos):
        yield "other_rel_pos_bias"
    if _is_there(model.patch_embed, "norm"):
        yield "patch_norm"
    if distilled(model):
        yield "distillation_token"
    ours = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if len({norm.eps for norm in ours}) > 1:
        yield "uneven_ln_eps"
    norms = [name for name in ("norm", "fc_norm") if _is_there(model, name)]
    if not all(_is_layer_norm(getattr(model, name)) for name in norms):
        yield "no_layer_norm"
    pool = model.global_pool
    if pool not in ("", "token", "avg", "map") or (pool == "token" and model.cls_token is None):
        yield f"{pool}_pool"
    if getattr(model, "pool_include_prefix", False):
        yield "pool_includes_prefix"
    if len(norms) != 1:
        yield "no_last_norm" if not norms else "two_last_norms"
    elif norms == ["norm"] and pool == "avg":
        yield "norm_before_pool"
    elif norms == ["fc_norm"] and pool == "map":
        yield "norm_after_pool"
    if not isinstance(model.head, nn.Linear | nn.Identity):
        yield "other_head"
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.LayerNorm | RmsNorm)}
    if any(issubclass(kind, nn.LayerNorm) for kind in kinds) and RmsNorm in kinds:
        yield "uneven_norms"
    if getattr(model, "attn_pool", None) is not None and not readout.is_plain_pool(model):
        yield "other_attention_pool"


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def distilled(model: Any) -> bool:
    """Return whether a network has a distillation token with a head of its own."""
    return getattr(model, "dist_token", None) is not None


def _extra_tokens(model: Any) -> list[Tensor]:
    tokens = (getattr(model, name, None) for name in ("reg_token", "dist_token"))
    return [token for token in tokens if token is not None]


def _channels(model: Any) -> int:
    """Return the channels of a network's images, by its first convolution."""
    return next(int(m.in_channels) for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))


def _scale_init(block: Any) -> float:
    """Return the initial value of a block's LayerScale, which timm keeps beside the learned values."""
    holders = (getattr(block, name, None) for name in ("ls1", "ls"))
    return float(next(h.init_values for h in (*holders, block) if getattr(h, "init_values", None) is not None))


def ratio(hidden: int, width: int) -> float:
    """Return the ratio for which ``hidden = int(width * ratio)``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _checked(model: Any, name: str, given: Sequence[float]) -> tuple[float, ...]:
    """Return a mean or standard deviation of pixels in [0, 1]. Raises UserError for one that can't be."""
    channels = _channels(model)
    hint = f"give {name}=(0.5,) * {channels}, or what it is for pixels in [0, 1]"
    try:
        values = tuple(float(value) for value in given)
    except (TypeError, ValueError):
        raise UserError(f"{name} {given!r} is no number for each channel", hint) from None
    if len(values) not in (1, channels):
        raise UserError(f"{name} has {len(values)} values, and the network {channels} channels", hint)
    if any(value < 0 or value > 1 or (name == "std" and value == 0) for value in values):
        raise UserError(f"{name} {values} is not that of pixels in [0, 1]", hint)
    return values


def _channel_values(model: Any, name: str, given: Sequence[float] | None) -> tuple[float, ...]:
    if given is not None:
        return _checked(model, name, given)
    if isinstance(model, ViT):
        return tuple(getattr(model.network, name))
    config = getattr(model, "pretrained_cfg", None)
    if not config or name not in config:
        some = f"(0.5,) * {_channels(model)}"
        raise UserError(
            f"the {name} that the network's images are normalised with is not known",
            f"give mean= and std=, such as {some}, or set network.pretrained_cfg = {{'mean': {some}, 'std': {some}}}",
        )
    return tuple(config[name])
