"""From the residual stream to the logits: pooling, last norm and head, and their linear part for attribution.

With the statistics of the last norm held at their values in a run, the logits are linear in the residual stream. Where
the norm comes before pooling each token has its own scale; where it comes after, the pooled vector has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atdiag.analysis.points.parts import learned_tokens
from atdiag.core.errors import UserError
from atdiag.networks.timm import inspection


@dataclass(frozen=True)
class Readout:
    """The head of a network as a linear function of its tokens after the norm."""

    shares: Tensor
    """[heads, N]: the weight of each token in the vector that each head reads: 1 for a class token, 1 / patches for
    the mean. One head, but for networks with a distillation token."""
    weight: Tensor
    """[heads, C, classes]."""
    bias: Tensor
    """[classes]."""
    norm: nn.Module | None
    """The last norm."""
    after: bool
    """Whether that norm comes after pooling."""


def pre_logits(model: Any, stream: Tensor) -> Tensor:
    """Apply a network's last norm, pooling and head to a residual stream [B, N, C]; return logits [B, classes].

    The "logit lens", for any block's stream.
    """
    out: Tensor = model.forward_head(model.norm(stream))
    return out


def has_lens(model: Any) -> bool:
    """Return whether a network has what :func:`pre_logits` applies."""
    return isinstance(getattr(model, "norm", None), nn.Module) and hasattr(model, "forward_head")


def readout(model: Any, label: str) -> Readout:
    """Return a network's head as a linear function. Raises UserError, saying why, for one that is not linear."""

    def lost(why: str) -> UserError:
        return UserError(f"the logits of {label} have no parts: {why}", "look at the residual stream instead")

    if getattr(model, "attn_pool", None) is not None:
        raise lost("attention pools the tokens with weights that depend on them")
    if not isinstance(model.head, nn.Linear):
        raise lost("it has no classifying head")
    pool = model.global_pool
    if pool not in ("token", "avg"):
        raise lost(f"its pooling ({pool or 'none'}) is not linear in the tokens")
    norms = [one for one in (model.norm, getattr(model, "fc_norm", None)) if not isinstance(one, nn.Identity | None)]
    if len(norms) > 1:
        raise lost("it has a norm before pooling and another after it")
    prefix = sum(token.shape[1] for token in learned_tokens(model))
    tokens = prefix + int(model.patch_embed.num_patches)
    like = model.head.weight
    heads, shares = [model.head], torch.zeros(1, tokens, dtype=like.dtype, device=like.device)
    if inspection.distilled(model):
        heads.append(model.head_dist)
        shares = torch.zeros(2, tokens, dtype=like.dtype, device=like.device)
        shares[0, 0] = shares[1, 1] = 0.5
    elif pool == "token":
        shares[0, 0] = 1
    else:
        first = 0 if getattr(model, "pool_include_prefix", False) else prefix
        shares[0, first:] = 1 / (tokens - first)
    weight = torch.stack([head.weight.T for head in heads])
    biases: list[Tensor] = [like.new_zeros(like.shape[0]) if head.bias is None else head.bias for head in heads]
    bias = torch.stack(biases).mean(0)
    norm = norms[0] if norms else None
    return Readout(shares, weight, bias, norm, norm is not None and norm is not model.norm)
