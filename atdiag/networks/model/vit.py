"""The one network class: timm's VisionTransformer with the attention module that transfer needs.

Both teachers and students are built from it, so that their maps come from the same code. Parameter names in a state
dict are timm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atdiag.core import resources
from atdiag.core.spec import Network
from atdiag.networks.model import components, readout
from atdiag.networks.model.blocks import Block as Block
from atdiag.networks.model.component import norm_layer, patch_embedding
from atdiag.transfer.attention import Attention, AttentionOverride, indices
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation
from atdiag.transfer.ops import QK


class ViT(VisionTransformer):  # type: ignore[misc]
    """A ViT built from a :class:`~atdiag.core.spec.Network`, with parameters *not* initialised: see ``students``."""

    dist_token: Tensor | None
    """The token of the component ``distillation_token``."""
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
            "embed_layer": patch_embedding(bias=True),
            "block_fn": Block,
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
            norm_layer=norm_layer(network),
            attn_layer=Attention,
            weight_init="skip",
            **arguments,
        )
        self.register_parameter("dist_token", None)
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

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions and the tokens that are no patches, a distillation token included."""
        if self.dist_token is None:
            tokens: Tensor = super()._pos_embed(x)
            return tokens
        return readout.with_distillation_token(self, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the tokens after the last norm [B, N, C] to logits [B, classes], or to what the head is applied to."""
        if self.dist_token is None:
            out: Tensor = super().forward_head(x, pre_logits)
            return out
        return readout.of_both_heads(self, x, pre_logits)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters exempt from weight decay besides all vectors: timm's, for each component."""
        ends = ("relative_position_bias_table", "rope.freqs", "dist_token")
        return {*super().no_weight_decay(), *(name for name, _ in self.named_parameters() if name.endswith(ends))}

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
            seen[last] = block.peek(x, last in wanted.values)
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
