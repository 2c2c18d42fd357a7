"""How a network's output is read: attention pooling, and DeiT's distillation token."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.core.spec.network import Value
from atdiag.networks.model.component import is_there, norm_layer


def pool_values(model: Any) -> dict[str, Value]:
    """Return what a network's attention pooling is like, where that is not what timm's ViT would build."""
    pool, block = model.attn_pool, model.blocks[0]
    found: dict[str, Value] = {}
    if pool.num_heads != getattr(getattr(block, "attn", block), "num_heads", None):
        found["heads"] = int(pool.num_heads)
    own: Network | None = getattr(model, "network", None)
    usual = plain_width(block) if own is None else int(own.width * own.mlp_ratio)
    if pool.mlp is not None and pool.mlp.fc1.out_features != usual:
        found["hidden"] = int(pool.mlp.fc1.out_features)
    # timm's VisionTransformer drops class token and registers before pooling (unless an option says no), Eva does not.
    if getattr(model, "pools_all", not hasattr(model, "pool_include_prefix")) and model.num_prefix_tokens:
        found["prefix"] = True
    return found


def plain_width(block: Any) -> int | None:
    """Return the width of a block's MLP, of a plain one with as many weights if it is gated; None without one."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        return None
    gated = not isinstance(mlp, Mlp)
    return int(1.5 * mlp.fc2.in_features + 0.5) if gated else int(mlp.fc1.out_features)


def attach_pool(vit: Any, network: Network) -> None:
    """Give a network the attention pooling that its component's values describe."""
    own = network.own("attention_pool")
    vit.pools_all = bool(own.get("prefix", False))
    vit.pool_include_prefix = vit.pool_include_prefix or vit.pools_all
    if not {"heads", "hidden"} & own.keys():
        return
    vit.attn_pool = AttentionPoolLatent(
        network.width,
        num_heads=int(own.get("heads", network.heads)),
        mlp_ratio=int(own["hidden"]) / network.width if "hidden" in own else network.mlp_ratio,
        norm_layer=norm_layer(network),
        act_layer=type_of_activation(vit),
    )


def type_of_activation(vit: Any) -> Any:
    """Return the activation of a network's attention pooling, as timm chose it."""
    return type(vit.attn_pool.mlp.act)


def is_plain_pool(model: Any) -> bool:
    """Return whether a network's attention pooling is one that a student can be given."""
    pool, block = model.attn_pool, model.blocks[0]
    if not isinstance(pool, AttentionPoolLatent) or not isinstance(getattr(pool, "mlp", None), Mlp):
        return False
    plain = isinstance(getattr(block, "mlp", None), Mlp)
    return bool(
        isinstance(pool.q, nn.Linear)
        and pool.q.bias is not None
        and pool.pos_embed is None
        and pool.latent_len == 1
        and pool.pool == "token"
        and pool.q.in_features == pool.kv.in_features == pool.out_features == model.embed_dim
        and not is_there(pool, "q_norm")
        and type(pool.norm) is type(block.norm1 if hasattr(block, "norm1") else pool.norm)
        and (type(pool.mlp.act) is type(block.mlp.act) if plain else isinstance(pool.mlp.act, nn.GELU))
    )


def attach_distillation_token(vit: Any, network: Network) -> None:
    """Turn the extra token into a distillation token, with a head of its own."""
    vit.dist_token = nn.Parameter(torch.empty_like(vit.reg_token))
    vit.reg_token = None
    vit.head_dist = nn.Linear(network.width, network.classes)


def with_distillation_token(vit: Any, x: Tensor) -> Tensor:
    """Return the tokens [B, N, C] for embedded patches: class token, distillation token, patches, with positions."""
    tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), vit.dist_token.expand(len(x), -1, -1), x], dim=1)
    return tokens if vit.pos_embed is None else tokens + vit.pos_embed


def of_both_heads(vit: Any, x: Tensor, pre_logits: bool) -> Tensor:
    """Return the mean of the two heads' logits [B, classes], or of the tokens that they read [B, C]."""
    if pre_logits:
        return (x[:, 0] + x[:, 1]) / 2
    logits: Tensor = (vit.head(x[:, 0]) + vit.head_dist(x[:, 1])) / 2
    return logits
