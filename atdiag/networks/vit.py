"""The one network class: timm's VisionTransformer with the attention module that transfer needs.

Teachers and students are both built here, so a teacher's map and a student's come from the same code. Parameter names
in a state dict are timm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.networks import components
from atdiag.spec import Network
from atdiag.transfer.attention import Attention
from atdiag.transfer.ops import QK


class Block(TimmBlock):  # type: ignore[misc]
    """timm's block, which passes a map in or out and takes its drop-path masks as an argument."""

    def forward(
        self,
        x: Tensor,
        given: QK | None = None,
        captured: list[QK] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, C] -> [B, N, C].

        given, captured: see :meth:`Attention.forward`. keep: [2, B, 1, 1], the factors of the attention and the MLP
        branch for each image (0 where the branch is dropped, 1 / (1 - rate) where kept).
        """
        branch: Tensor = self.ls1(self.attn(self.norm1(x), given, captured))
        x = x + (branch if keep is None else keep[0] * branch)
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if keep is None else keep[1] * branch)


class ViT(VisionTransformer):  # type: ignore[misc]
    """A ViT built from a :class:`~atdiag.spec.Network`. Its parameters are *not* initialised: see ``students``."""

    def __init__(self, network: Network) -> None:
        parts = components.resolve(network.components)
        arguments: dict[str, Any] = {
            "class_token": network.class_token,
            "global_pool": "token" if network.class_token else "avg",
            "embed_layer": components.patch_embedding(bias=True),
        }
        for part in parts:
            arguments |= part.arguments(network)
        super().__init__(
            img_size=network.image_size,
            patch_size=network.patch_size,
            in_chans=network.channels,
            num_classes=network.classes,
            embed_dim=network.width,
            depth=network.depth,
            num_heads=network.heads,
            mlp_ratio=network.mlp_ratio,
            norm_layer=lambda width, **kw: nn.LayerNorm(width, eps=network.norm_eps, **kw),
            block_fn=Block,
            attn_layer=Attention,
            weight_init="skip",
            **arguments,
        )
        for part in parts:
            part.attach(self, network)
        self.network = network
        self.register_buffer("mean", torch.tensor(network.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(1, -1, 1, 1), persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, channels, S, S] in [0, 1] -> the tokens [B, N, C] that enter the first block."""
        x = self.patch_embed((images - self.mean) / self.std)
        tokens: Tensor = self.norm_pre(self._pos_embed(x))
        return tokens

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone, beside all vectors: timm's, for ViT and for BEiT."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {*super().no_weight_decay(), *tables}

    def forward(
        self,
        images: Tensor,
        given: Mapping[int, QK] | None = None,
        captured: dict[int, QK] | None = None,
        capture: Iterable[int] = (),
        keep: Tensor | None = None,
    ) -> Tensor:
        """Images [B, channels, S, S] in [0, 1] (not normalised: the network does that) -> logits [B, classes].

        given: block -> the map that it uses instead of its own. capture: blocks whose maps are put into ``captured``.
        keep: drop-path factors [depth, 2, B, 1, 1].
        """
        wanted = frozenset(capture)
        x = self.embed(images)
        for i, block in enumerate(self.blocks):
            out: list[QK] | None = [] if i in wanted else None
            x = block(x, None if given is None else given.get(i), out, None if keep is None else keep[i])
            if out and captured is not None:
                captured[i] = out[0]
        logits: Tensor = self.forward_head(self.norm(x))
        return logits

    @torch.no_grad()
    def maps(self, images: Tensor, layers: Iterable[int]) -> dict[int, QK]:
        """The maps of some blocks for images [B, channels, S, S] in [0, 1].

        Runs no further than the last of them, and there no further than q and k.
        """
        wanted = sorted(set(layers))
        if not wanted:
            return {}
        found: dict[int, QK] = {}
        x = self.embed(images)
        for i, block in enumerate(self.blocks[: wanted[-1]]):
            out: list[QK] | None = [] if i in wanted else None
            x = block(x, None, out)
            if out:
                found[i] = out[0]
        last = self.blocks[wanted[-1]]
        found[wanted[-1]] = last.attn.map(last.norm1(x))
        return found

    def shared_tokens(self, other: Network) -> Tensor | None:
        """Indices of this network's tokens that a network with fewer registers also has; None if all."""
        shared = self.network.tokens_shared_with(other)
        return None if shared is None else torch.tensor(shared)
