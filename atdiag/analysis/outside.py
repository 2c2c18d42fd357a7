"""A user's own timm ViT, unmodified, with the interface of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atdiag.core.errors import UserError
from atdiag.networks.timm import inspection


class Outside(nn.Module):
    """An unmodified timm ViT with our interface: takes images in [0, 1], normalises them itself, returns logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        if reason := inspection.why_not(model):
            raise UserError(f"{type(model).__name__} can't be looked into: {reason}")
        self.model = model
        self.network = inspection.describe(model)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.network, name)).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, S, S] in [0, 1] to the network's own output."""
        pixels = (images - self.mean) / self.std
        out: Tensor = self.model(pixels.to(self.model.patch_embed.proj.weight.dtype))
        return out
