"""Masked autoencoding (He et al. 2022): the loss by which a network is pre-trained without labels.

Of the P patches of an image, ``Masked.hidden(P)`` are hidden, drawn at random for each image and step. The network
embeds all patches with their positions; its blocks and its last norm see the visible ones alone, with the class token
and registers. The decoder is given what they became, a learned token for each hidden patch, and positions of its own,
and predicts the pixels of all patches. The loss of an image is the mean over its hidden patches of the squared error
against the patch's pixels, normalised by their own mean and standard deviation (section 4.1, "normalised pixels"; a
patch of one colour is all zeros), or as the network normalises images.

The decoder belongs to the training and not to the network: nothing of it is stored with the result.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from atdiag.core import randomness
from atdiag.core.spec import Masked, Network
from atdiag.networks.model.blocks import Block
from atdiag.networks.model.vit import ViT
from atdiag.transfer import ops
from atdiag.transfer.attention import AttentionOverride


def hidden(masked: Masked, network: Network, seed: int, step: int, samples: NDArray[np.int64]) -> Tensor:
    """Return which patches are hidden, a boolean tensor [B, P]; each row depends on seed, step and sample alone."""
    patches = network.grid**2
    draws = randomness.uniform(seed, "masked", step, np.arange(patches)[:, None], samples).T
    order = np.argsort(draws, axis=1, kind="stable")
    out = np.zeros(draws.shape, dtype=bool)
    np.put_along_axis(out, order[:, : masked.hidden(patches)], True, axis=1)
    return torch.from_numpy(out)


class Decoder(nn.Module):
    """Predict the pixels of all patches from a network's tokens of the visible ones."""

    def __init__(self, masked: Masked, network: Network, seed: int) -> None:
        super().__init__()
        width = masked.width
        self.prefix = network.prefix_tokens
        self.embed = nn.Linear(network.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.targets = masked.pixels
        self.fixed = masked.positions == "sincos"
        self.pos_embed = nn.Parameter(torch.empty(1, network.tokens, width), requires_grad=not self.fixed)
        self.blocks = nn.ModuleList(TimmBlock(width, masked.heads, qkv_bias=True) for _ in range(masked.depth))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, network.channels * network.patch_size**2)
        self._initialise(seed)
        if self.fixed:
            self.pos_embed.copy_(sincos(network, width))

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draw each parameter from a generator keyed by its name, by the rules of :mod:`..networks.model.students`."""
        for name, parameter in self.named_parameters():
            draw = randomness.generator(seed, "init", f"decoder.{name}")
            if name in ("mask_token", "pos_embed"):
                values = 0.02 * draw.standard_normal(parameter.shape, dtype=np.float32)
            elif parameter.ndim == 2:
                bound = math.sqrt(6 / sum(parameter.shape))
                values = bound * (2 * draw.random(parameter.shape, dtype=np.float32) - 1)
            else:
                fill = 1.0 if name.endswith("weight") else 0.0
                values = np.full(parameter.shape, fill, dtype=np.float32)
            parameter.copy_(torch.from_numpy(values))

    def forward(self, seen: Tensor, hide: Tensor) -> Tensor:
        """Return the pixels of all patches [B, P, channels x patch x patch].

        seen: the network's tokens [B, prefix + V, C], the visible patches in order. hide: which are hidden [B, P].
        """
        x = self.embed(seen)
        patches = (
            self.mask_token.to(x.dtype).expand(*hide.shape, -1).masked_scatter(~hide[..., None], x[:, self.prefix :])
        )
        x = torch.cat([x[:, : self.prefix], patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.pixels(self.norm(x[:, self.prefix :]))
        return out


def sincos(network: Network, width: int) -> Tensor:
    """Return fixed positions [1, N, width] of a network's tokens (He et al.), zero for those that are no patches.

    A quarter each of sines and cosines of the row, and of the column, at wavelengths from 2 pi to 10,000 times that.
    """
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(network.grid, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    rows, columns = line[:, None].expand(-1, network.grid, -1), line[None].expand(network.grid, -1, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return F.pad(patches, (0, 0, network.prefix_tokens, 0))[None].float()


def encode(vit: ViT, images: Tensor, hide: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return a network's tokens [B, prefix + V, C] after its last norm, of images whose patches ``hide`` are hidden.

    images: [B, channels, S, S] in [0, 1]. hide: [B, P], equally many in each image. keep: drop-path factors.
    """
    x = vit.embed(images)
    first, batch = vit.network.prefix_tokens, len(x)
    visible = x[:, first:][~hide].view(batch, -1, x.shape[-1])
    x = torch.cat([x[:, :first], visible], dim=1)
    places = (~F.pad(hide, (first, 0))).nonzero()[:, 1].view(batch, -1)
    for i, block in enumerate(vit.blocks):
        x = block(x, _own_map(block, x, places), None if keep is None else keep[i])
    out: Tensor = vit.norm(x)
    return out


def _own_map(block: Block, x: Tensor, places: Tensor) -> AttentionOverride | None:
    """Return the map that a block has among some of the tokens, if it has a bias for each pair of places; else None.

    places: [B, n], where the tokens x [B, n, C] are among all.
    """
    if block.attn.rel_pos_bias is None:
        return None
    own = block.peek(x).qk
    assert own.bias is not None
    bias = own.bias[:, places[:, :, None], places[:, None, :]].transpose(0, 1)  # another one for each image
    return AttentionOverride("map", ops.Averaged((ops.logits(own._replace(bias=None)) + bias).softmax(-1)))


def targets(network: Network, images: Tensor, pixels: str = "of patch") -> Tensor:
    """Return the normalised pixels of all patches [B, P, channels x patch x patch] of images [B, channels, S, S].

    pixels: see :class:`Masked`.
    """
    size = network.patch_size
    if pixels == "of network":
        mean, std = (images.new_tensor(one).view(1, -1, 1, 1) for one in (network.mean, network.std))
        images = (images - mean) / std
    patches = images.unfold(2, size, size).unfold(3, size, size)  # [B, channels, grid, grid, patch, patch]
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(images), network.grid**2, -1)
    if pixels == "of network":
        return flat
    return (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + 1e-6).sqrt()


def loss(vit: ViT, decoder: Decoder, images: Tensor, hide: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return the mean squared error of the hidden patches' normalised pixels, mean over images. See :func:`encode`."""
    errors = (
        (decoder(encode(vit, images, hide, keep), hide) - targets(vit.network, images, decoder.targets))
        .square()
        .mean(-1)
    )
    mean: Tensor = (errors * hide).sum() / hide.sum()
    return mean
