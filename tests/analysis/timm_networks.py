"""Architectures of timm with random weights, for tests of tracing."""

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from atdiag.analysis import images

TIMM = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_36x1_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_rope_224": {},
    "vit_so150m_patch16_reg4_gap_256": {},
}


def build(name, **arguments):
    """Build a small timm architecture with random weights; biases and scales are not neutral."""
    size = 28 if "14" in name else 32
    small = {"img_size": size, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, **arguments}
    torch.manual_seed(0)
    model = timm.create_model(name, **small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pictures(subject, count=4, seed=0):
    network = subject.network
    shape = (count, network.channels, network.image_size, network.image_size)
    return images.from_arrays(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(some):
    return next(some.batches(len(some))).pixels


class Calls(nn.Module):
    """Attention that calls SDPA with arguments of our choice."""

    def __init__(self, attn, **options):
        super().__init__()
        self.qkv, self.proj, self.options = attn.qkv, attn.proj, options

    def forward(self, x, **unused):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.proj(out.transpose(1, 2).flatten(2))
