"""Plant a fault in a loaded teacher by a stated, seeded operation (:class:`~atdiag.core.spec.Operation`).

Each changes the network in memory, never the file. Two kinds:

- of the weights: ``scaled``, ``scrambled``, ``drawn_anew`` and ``sharp`` leave an ordinary network with other weights,
  and its own accuracy is that of these;
- of what the network shows: ``uniform`` puts a hook on the way of q to the logits, ``shuffled`` has it see another
  image, ``sliced`` masks what is transferred. The weights stay, so a student that starts from them, and the accuracy
  of the weights themselves (the teacher's row in every table), know nothing of it.

Both kinds are the same to a transfer and to nnsight, but for ``sliced``: the network itself attends to its registers as
before, or the maps of later blocks would be others, and nnsight traces what it does.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atdiag.core import randomness
from atdiag.core.spec import Operation
from atdiag.networks.model.vit import ViT
from atdiag.transfer.attention import AttentionOverride
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation

CLOSED = -1e4
"""Added to a logit, it leaves a probability of exactly 0 in float32, and stays finite in half precision."""
POOL = 4096
"""Number of images among which ``shuffled`` finds the other image."""
POOL_CLUTTER = 6
"""Their fragments of clutter: as many as in the scenes of pre-training."""


@torch.no_grad()
def apply(vit: ViT, operation: Operation) -> ViT:
    """Return the network with the operation done; the given one is changed. Raises ValueError where it can't be."""
    return _OPERATIONS[operation.name](vit, operation)


def _sharp(vit: ViT, operation: Operation) -> ViT:
    """Multiply the logits of some blocks: queries and position bias, whose sum of products the logits are."""
    factor = _given(operation.factor)
    for layer in operation.layers:
        attn = vit.blocks[layer].attn
        own = [attn.q_weight, attn.q_bias]
        if attn.rel_pos_bias is not None:
            own += list(attn.rel_pos_bias.parameters())
        for parameter in own:
            if parameter is not None:
                parameter.mul_(factor)
    return vit


class Nought(nn.Module):
    """A hook on q and k that takes q's values away, so that every logit is 0."""

    def forward(self, x: Tensor, name: str, heads: Tensor | None) -> Tensor:
        """Return zeros for q [B, h, N, d], and k as it is."""
        return torch.zeros_like(x) if name == "q" else x


def _uniform(vit: ViT, operation: Operation) -> ViT:
    """Make some blocks' maps 1 / N."""
    if "rel_pos_bias" in vit.network.components:
        raise ValueError("queries of zero leave the relative position bias: make uniform maps of another teacher")
    for layer in operation.layers:
        vit.blocks[layer].attn.qk_hooks["nought"] = Nought()
    return vit


class Shuffled(ViT):
    """A network that sees another image than it is given.

    The other is one of a fixed pool, found from the given image's own pixels: it is the same in every epoch, in
    training and at test, and whatever else is in the batch.
    """

    gallery: Tensor

    def __init__(self, vit: ViT, pool: np.ndarray) -> None:
        super().__init__(vit.network)
        self.load_state_dict(vit.state_dict())
        self.register_buffer("gallery", torch.from_numpy(pool), persistent=False)

    def others(self, images: Tensor) -> Tensor:
        """Return the other image [B, channels, S, S] in [0, 1] for each of the given ones."""
        pixels = (images * 255).round().to(torch.uint8).cpu().numpy()
        chosen = [zlib.crc32(one.tobytes()) % len(self.gallery) for one in pixels]
        others: Tensor = self.gallery[torch.tensor(chosen, device=self.gallery.device)].float() / 255
        return others

    def embed(self, images: Tensor) -> Tensor:
        """Embed the other images' patches in place of the given ones'."""
        return super().embed(self.others(images))


def _shuffled(vit: ViT, operation: Operation) -> ViT:
    """Have the network see scenes drawn with the seed, which no run trains on."""
    from atdiag.data import scenes

    pool = scenes.train_scenes("digits", POOL, _given(operation.seed), POOL_CLUTTER)
    return Shuffled(vit, pool.images)


class Sliced(ViT):
    """A network whose maps are shown as a student without registers is given them, to students with registers too.

    No token but a register sees the registers, and its row is renormalised. Registers keep their own rows, whose
    outputs no other token then reads.
    """

    mask: Tensor

    def __init__(self, vit: ViT, layers: tuple[int, ...]) -> None:
        super().__init__(vit.network)
        self.load_state_dict(vit.state_dict())
        self.layers = layers
        network = vit.network
        first = int(network.class_token)
        register = torch.zeros(network.tokens, dtype=torch.bool)
        register[first : first + network.registers] = True
        mask = torch.zeros(network.heads, network.tokens, network.tokens)
        mask[:, (~register)[:, None] & register] = CLOSED
        self.register_buffer("mask", mask, persistent=False)

    def observe(
        self,
        images: Tensor,
        wanted: CaptureRequest,
        given: Mapping[int, AttentionOverride] | None = None,
        keep: Tensor | None = None,
    ) -> Observation:
        """Observe the network, with some blocks' maps sliced in what is returned."""
        seen = super().observe(images, wanted, given, keep)
        shown = {i: self._sliced(one) if i in self.layers else one for i, one in seen.seen.items()}
        return replace(seen, seen=shown)

    def _sliced(self, record: AttentionRecord) -> AttentionRecord:
        qk = record.qk
        return record._replace(map=qk._replace(bias=self.mask if qk.bias is None else qk.bias + self.mask))


def _sliced(vit: ViT, operation: Operation) -> ViT:
    """Show the maps of some blocks without registers."""
    if not vit.network.registers:
        raise ValueError("only the maps of a network with registers can be sliced")
    return Sliced(vit, operation.layers)


def _scaled(vit: ViT, operation: Operation) -> ViT:
    """Multiply what enters the first norm: embedded patches, class token, position embeddings, registers."""
    embedding = [vit.patch_embed.proj.weight, vit.patch_embed.proj.bias]
    for parameter in (*embedding, vit.cls_token, vit.reg_token, vit.pos_embed):
        if parameter is not None:
            parameter.mul_(_given(operation.factor))
    return vit


def _scrambled(vit: ViT, operation: Operation) -> ViT:
    """Nearly shut the attention branch of some blocks, and draw their queries and keys anew, larger.

    The gain acts on the branch's LayerScale. Weights are Xavier-uniform times the factor, biases zero.
    """
    if "layer_scale" not in vit.network.components:
        raise ValueError("an attention branch can be shut only where there is a layer_scale")
    for layer in operation.layers:
        block = vit.blocks[layer]
        block.ls1.gamma.mul_(_given(operation.gain))
        _draw_maps(block.attn, layer, _given(operation.seed), _given(operation.factor))
    return vit


def _drawn_anew(vit: ViT, operation: Operation) -> ViT:
    """Draw the MLPs, or queries and keys, of some blocks anew, as at initialisation."""
    seed = _given(operation.seed)
    for layer in operation.layers:
        block = vit.blocks[layer]
        if operation.module == "qk":
            _draw_maps(block.attn, layer, seed, 1.0)
            continue
        for name, linear in (("fc1", block.mlp.fc1), ("fc2", block.mlp.fc2)):
            linear.weight.copy_(_xavier(linear.weight, seed, f"{layer}.mlp.{name}"))
            linear.bias.zero_()
    return vit


def _draw_maps(attn: Any, layer: int, seed: int, factor: float) -> None:
    for name in ("q", "k"):
        weight, bias = getattr(attn, f"{name}_weight"), getattr(attn, f"{name}_bias")
        weight.copy_(factor * _xavier(weight, seed, f"{layer}.attn.{name}"))
        if bias is not None:
            bias.zero_()
    if attn.rel_pos_bias is not None:
        for parameter in attn.rel_pos_bias.parameters():
            parameter.zero_()


def _xavier(weight: Tensor, seed: int, name: str) -> Tensor:
    """Return Xavier-uniform values in the shape of a weight, as :func:`~atdiag.networks.model.students.initialise`."""
    bound = math.sqrt(6 / sum(weight.shape))
    draw = randomness.generator(seed, "operation", name)
    return torch.from_numpy(bound * (2 * draw.random(tuple(weight.shape), dtype=np.float32) - 1))


def _given(value: Any) -> Any:
    assert value is not None  # the spec has checked it
    return value


_OPERATIONS: dict[str, Callable[[ViT, Operation], ViT]] = {
    "sharp": _sharp,
    "uniform": _uniform,
    "shuffled": _shuffled,
    "scaled": _scaled,
    "scrambled": _scrambled,
    "drawn_anew": _drawn_anew,
    "sliced": _sliced,
}
