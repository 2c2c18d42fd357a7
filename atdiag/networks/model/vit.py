"""The one network class: timm's VisionTransformer with the attention module that transfer needs.

Both teachers and students are built from it, so that their maps come from the same code. Parameter names in a state
dict are timm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.core import resources
from atdiag.core.spec import Network
from atdiag.networks.model import components
from atdiag.transfer.attention import Attention, AttentionOverride, indices
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation
from atdiag.transfer.ops import QK


class Block(TimmBlock):  # type: ignore[misc]
    """timm's block, with attention overrides, attention records, and drop-path masks as an argument."""

    def forward(self, x: Tensor, given: AttentionOverride | None = None, keep: Tensor | None = None) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C].

        given: see :meth:`Attention.forward`. keep: [2, B, 1, 1], the factors of the attention and the MLP branch for
        each image (0 if the branch is dropped, 1 / (1 - rate) if kept).
        """
        return self._rest(x, self.attn(self.norm1(x), given), keep)

    def see(
        self, x: Tensor, given: AttentionOverride | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, AttentionRecord]:
        """Run :meth:`forward`, and also return the attention's record."""
        branch, seen = self.attn.see(self.norm1(x), given)
        return self._rest(x, branch, keep), seen

    def _rest(self, x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
        branch = self.ls1(branch)
        x = x + (branch if keep is None else keep[0] * branch)
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if keep is None else keep[1] * branch)


class ViT(VisionTransformer):  # type: ignore[misc]
    """A ViT built from a :class:`~atdiag.core.spec.Network`, with parameters *not* initialised: see ``students``."""

    origin: Any = None
    """Origin of published weights, as a dataclass (see ``weights.Origin``)."""

    def __init__(self, network: Network) -> None:
        if torch.get_default_device().type != "meta":
            resources.room(
                4 * network.parameters, f"the {network.parameters:,} weights of a network of width {network.width}"
            )
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
        """Map images [B, channels, S, S] in [0, 1] to the tokens [B, N, C] that enter the first block."""
        x = self.patch_embed((images - self.mean) / self.std)
        tokens: Tensor = self.norm_pre(self._pos_embed(x))
        return tokens

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters exempt from weight decay besides all vectors: timm's, for ViT and for BEiT."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {*super().no_weight_decay(), *tables}

    def forward(
        self, images: Tensor, given: Mapping[int, AttentionOverride] | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Map images [B, channels, S, S] in [0, 1] (the network normalises them) to logits [B, classes].

        given: block -> its attention override. keep: drop-path factors [depth, 2, B, 1, 1].
        """
        logits = self.observe(images, CaptureRequest(logits=True), given, keep).logits
        assert logits is not None
        return logits

    def observe(
        self,
        images: Tensor,
        wanted: CaptureRequest,
        given: Mapping[int, AttentionOverride] | None = None,
        keep: Tensor | None = None,
    ) -> Observation:
        """Run only as far as needed for the request, and return the observation. Arguments as in :meth:`forward`."""
        seen: dict[int, AttentionRecord] = {}
        features: dict[int, Tensor] = {}
        last = wanted.whole_blocks
        x = self.embed(images)
        for i, block in enumerate(self.blocks if wanted.logits else self.blocks[:last]):
            own = None if given is None else given.get(i), None if keep is None else keep[i]
            if i in wanted.attention:
                x, seen[i] = block.see(x, *own)
            else:
                x = block(x, *own)
            if i in wanted.features:
                features[i] = x
        if wanted.logits:
            return Observation(seen, features, self.forward_head(self.norm(x)))
        if last in wanted.attention:
            block = self.blocks[last]
            seen[last] = block.attn.peek(block.norm1(x), last in wanted.values)
        return Observation(seen, features)

    def maps(self, images: Tensor, layers: Iterable[int]) -> dict[int, QK]:
        """Return the maps of some blocks for images [B, channels, S, S] in [0, 1], without gradients."""
        with torch.no_grad():
            seen = self.observe(images, CaptureRequest(maps=frozenset(layers))).seen
        return {layer: one.qk for layer, one in seen.items()}

    def shared_tokens(self, other: Network) -> Tensor | None:
        """Return the indices of the tokens that a network with fewer registers also has, on our device; None: all."""
        shared = self.network.tokens_shared_with(other)
        return None if shared is None else indices(shared, self.mean.device)
