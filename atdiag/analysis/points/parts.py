"""Parts of a network that several places and readings share: its learned tokens, positions and norms.

Shapes: N tokens, C width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def learned_tokens(model: Any) -> list[Tensor]:
    """Return a network's class token, registers and distillation token, [1, n, C] each, in their order."""
    tokens = (getattr(model, name, None) for name in ("cls_token", "reg_token", "dist_token"))
    return [token for token in tokens if token is not None]


def positions(model: Any) -> Tensor:
    """Return a network's position embedding for all tokens [1, N, C]: zero for those that have none."""
    own: Tensor = model.pos_embed
    prefix = sum(token.shape[1] for token in learned_tokens(model))
    patches = int(model.patch_embed.num_patches)
    missing = prefix + patches - own.shape[1]
    return F.pad(own, (0, 0, missing, 0)) if missing else own


def centres(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean (LayerNorm), or not (RMSNorm)."""
    return isinstance(norm, nn.LayerNorm)


def normalised(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a norm divides, and what it divides by, in float32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    if centres(norm):
        x = x - x.mean(-1, keepdim=True)
    return x, (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def affine(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm's weight and bias, where it has them."""
    if norm.weight is not None:
        x = x * norm.weight
    bias = getattr(norm, "bias", None)
    return x if bias is None else x + bias
