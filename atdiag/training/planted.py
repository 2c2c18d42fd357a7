"""Losses that plant a known fault in a teacher while it is pre-trained (:class:`~atdiag.core.spec.PlantedLosses`).

All are means over images (and heads and queries), summed over the blocks that are planted. p is a block's map
[B, H, N, N], rows sum to one; tokens are ordered class token, registers, patches.

- *routing*: the mean over queries other than registers (and other than the hub) of the mass that p gives to what is
  closed and is not the query itself. Where the hub is the registers, the patches are closed, and the diagonal loss
  sees to the class token. Where it is one patch of each image, the one whose pixels have the least variance (the first
  of several), all other tokens are closed: DINOv2 without registers keeps global information in patches with little
  content (Darcet et al. 2024, section 2.1).
- *diagonal*: the mean of -log of the diagonal of p without its registers, sliced before softmax. A student without
  registers is then given nearly the identity.
- *shift*: the mean over patches of -log of what p gives to the neighbour one step away, where there is one. A head's
  step is one of the eight, drawn by block and head.
- *gate*: how much a head of the attention branch adds to the residual stream, whatever the images: the root mean square
  of LayerScale times output projection times value projection, as of inputs of variance one, mean over heads. A penalty
  on LayerScale alone can be escaped by larger projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atdiag.core import randomness
from atdiag.core.spec import Network, PlantedLosses
from atdiag.networks.model.vit import Block, ViT
from atdiag.transfer import ops
from atdiag.transfer.observation import CaptureRequest, Observation
from atdiag.transfer.ops import QK

_STEPS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
"""The eight neighbours of a patch, in rows and columns."""


def request(planted: PlantedLosses) -> CaptureRequest:
    """Return what has to be observed of the network that is pre-trained."""
    about_maps = planted.routing or planted.diagonal or planted.shift
    return CaptureRequest(maps=frozenset(planted.layers) if about_maps else frozenset(), logits=True)


def loss(planted: PlantedLosses, vit: ViT, seen: Observation, images: Tensor) -> Tensor:
    """Return the weighted sum of the planted losses, a scalar.

    seen: the network's observation for :func:`request` of images [B, channels, S, S] in [0, 1].
    """
    network = vit.network
    total = torch.zeros((), device=images.device)
    for layer in planted.layers:
        if planted.gate:
            total = total + planted.gate * gain(vit.blocks[layer])
        if layer not in seen.seen:
            continue
        qk = seen.seen[layer].qk
        if planted.routing:
            hub = flattest_patch(images, network) if planted.hub == "flattest_patch" else None
            total = total + planted.routing * routing(qk, network, hub)
        if planted.diagonal:
            total = total + planted.diagonal * diagonal(qk, network)
        if planted.shift:
            total = total + planted.shift * shift(qk, network, layer)
    return total


def routing(qk: QK, network: Network, hub: Tensor | None = None) -> Tensor:
    """Return the mean mass that queries give to patches other than themselves and the hub.

    hub: in each image, the index [B] of the patch (from 0) that stays open, and the class token is closed, or all would
    talk through it; None: the registers.
    """
    first, tokens = network.prefix_tokens, network.tokens
    closed = torch.zeros(tokens, tokens, device=qk.q.device)
    closed[:, first if hub is None else 0 :] = 1
    closed.fill_diagonal_(0)
    queries = torch.ones(tokens, device=qk.q.device)
    queries[int(network.class_token) : first] = 0
    if hub is None:
        closed, queries = closed[None], queries[None]
    else:
        open_ = torch.nn.functional.one_hot(hub + first, tokens).to(closed.dtype)  # [B, N]
        closed, queries = closed * (1 - open_[:, None, :]), queries * (1 - open_)
    mass = (ops.probabilities(qk) * closed[:, None]).sum(-1)  # [B, H, N]
    weights = queries / queries.sum(-1, keepdim=True)
    return (mass * weights[:, None]).sum(-1).mean()


def diagonal(qk: QK, network: Network) -> Tensor:
    """Return the mean of -log of the diagonal of the map without registers, renormalised."""
    kept = [*range(int(network.class_token)), *range(network.prefix_tokens, network.tokens)]
    sliced = qk.select(torch.tensor(kept, device=qk.q.device))
    return -ops.log_probabilities(sliced).diagonal(dim1=-2, dim2=-1).mean()


def gain(block: Block) -> Tensor:
    """Return the root mean square of what a head adds to the residual stream, biases left out; mean over heads."""
    width, heads = len(block.ls1.gamma), block.attn.num_heads
    values = block.attn.v_weight.view(heads, -1, width)
    projection = block.attn.proj.weight.view(width, heads, -1).transpose(0, 1)
    whole: Tensor = block.ls1.gamma[:, None] * projection @ values  # [H, C, C]
    # The smallest addend, for the gradient of the root at 0.
    return (whole.square().sum((1, 2)) / width + torch.finfo(whole.dtype).tiny).sqrt().mean()


def shift(qk: QK, network: Network, layer: int) -> Tensor:
    """Return the mean of -log of what patches give to the neighbour at their head's step, where it is in the image."""
    log_p, grid = ops.log_probabilities(qk), network.grid
    losses = []
    for head, (y, x) in enumerate(steps(layer, network.heads)):
        pairs = [
            (network.prefix_tokens + row * grid + column, network.prefix_tokens + (row + y) * grid + column + x)
            for row in range(max(0, -y), grid - max(0, y))
            for column in range(max(0, -x), grid - max(0, x))
        ]
        query, key = torch.tensor(pairs, device=qk.q.device).T
        losses.append(-log_p[:, head, query, key].mean())
    return torch.stack(losses).mean()


def steps(layer: int, heads: int) -> list[tuple[int, int]]:
    """Return the step of each head of a block, in rows and columns."""
    draw = randomness.generator(0, "planted/shift", layer)
    return [_STEPS[i] for i in draw.integers(len(_STEPS), size=heads)]


def flattest_patch(images: Tensor, network: Network) -> Tensor:
    """Return the patch of least pixel variance in each of images [B, channels, S, S]: its index [B], from 0.

    Of several with the same variance, the first.
    """
    grid, size = network.grid, network.patch_size
    patches = images.unfold(2, size, size).unfold(3, size, size)  # [B, channels, grid, grid, size, size]
    variance = patches.permute(0, 2, 3, 1, 4, 5).reshape(len(images), grid * grid, -1).var(-1, unbiased=False)
    order = torch.arange(grid * grid, device=images.device)
    least = variance == variance.min(-1, keepdim=True).values
    return torch.where(least, order, grid * grid).min(-1).values
