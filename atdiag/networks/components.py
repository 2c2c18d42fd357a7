"""Native components: parts that a teacher has and the plain ViT lacks, each found on a network or added to one.

Which of a teacher's differences the *standard* student follows anyway, because their tokens must line up: the token
grid and the class token (present or not). Everything here is ablated: the standard student has none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.spec import Network
from atdiag.words import suggest


class RelPosBias(nn.Module):
    """BEiT's relative position bias: a learned value for each head and each offset between patches.

    Returns [H, N, N] for the whole token sequence. The class token has three values of its own (to it, from it, with
    itself), as in BEiT; registers, which have no position, get none (zero bias).
    """

    index: Tensor

    def __init__(self, grid: int, class_token: bool, registers: int, heads: int) -> None:
        super().__init__()
        index = gen_relative_position_index((grid, grid), class_token=class_token)
        rows = int(index.max()) + 1
        # timm's name, so that a BEiT checkpoint's key fits.
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("index", index, persistent=False)
        self.registers, self.prefix = registers, int(class_token)

    def forward(self) -> Tensor:
        """The bias [H, N, N]."""
        bias = self.relative_position_bias_table[self.index.flatten()]
        bias = bias.view(*self.index.shape, -1).permute(2, 0, 1)
        if not self.registers:
            return bias.contiguous()
        p, r = self.prefix, self.registers
        full = bias.new_zeros(bias.shape[0], bias.shape[1] + r, bias.shape[2] + r)
        keep = torch.tensor([*range(p), *range(p + r, full.shape[1])], device=bias.device)
        return full.index_put(
            (torch.arange(bias.shape[0], device=bias.device)[:, None, None], keep[:, None], keep), bias
        )


@dataclass(frozen=True)
class Component:
    """One native component.

    arguments: what it changes in the arguments of timm's ``VisionTransformer``.
    attach: what it adds once the network is built.
    found: whether a built network has it.
    parameters: fragments of the names of the parameters that come with it.
    """

    name: str
    summary: str
    source: str
    found: Callable[[VisionTransformer], bool]
    arguments: Callable[[Network], dict[str, Any]] = lambda network: {}
    attach: Callable[[VisionTransformer, Network], None] = lambda vit, network: None
    parameters: tuple[str, ...] = field(default=())


def _attach_bias(vit: VisionTransformer, network: Network) -> None:
    for block in vit.blocks:
        block.attn.rel_pos_bias = RelPosBias(network.grid, network.class_token, network.registers, network.heads)


COMPONENTS: dict[str, Component] = {
    component.name: component
    for component in (
        Component(
            "layer_scale",
            "A learned factor per channel on each residual branch, starting small.",
            "Touvron et al. 2021, Going deeper with Image Transformers (CaiT), section 2",
            found=lambda vit: not isinstance(vit.blocks[0].ls1, nn.Identity),
            arguments=lambda network: {"init_values": network.layer_scale_init},
            parameters=("ls1.", "ls2."),
        ),
        Component(
            "registers",
            "Extra learned tokens that belong to no patch and are dropped at the output.",
            "Darcet et al. 2024, Vision Transformers Need Registers, section 2",
            found=lambda vit: vit.num_reg_tokens > 0,
            # As in DINOv2 with registers, positions are then given to patches alone.
            arguments=lambda network: {"reg_tokens": network.registers, "no_embed_class": True},
            parameters=("reg_token",),
        ),
        Component(
            "pre_norm",
            "A LayerNorm on the embedded tokens before the first block; the patch embedding has no bias.",
            "Radford et al. 2021, CLIP, section 2.4",
            found=lambda vit: not isinstance(vit.norm_pre, nn.Identity),
            arguments=lambda network: {"pre_norm": True},
            parameters=("norm_pre.",),
        ),
        Component(
            "quick_gelu",
            "The activation x * sigmoid(1.702 x) in place of GELU.",
            "Hendrycks and Gimpel 2016, GELUs, section 2; used by CLIP's published weights",
            found=lambda vit: type(vit.blocks[0].mlp.act).__name__ == "QuickGELU",
            arguments=lambda network: {"act_layer": "quick_gelu"},
        ),
        Component(
            "rel_pos_bias",
            "A learned bias on the attention logits for each head and each offset between two patches.",
            "Shaw et al. 2018; in this form Bao et al. 2022, BEiT, after Raffel et al. 2020",
            found=lambda vit: getattr(vit.blocks[0].attn, "rel_pos_bias", None) is not None,
            attach=_attach_bias,
            parameters=("rel_pos_bias.",),
        ),
        Component(
            "no_abs_pos",
            "No absolute position embedding.",
            "Bao et al. 2022, BEiT, as fine-tuned and as in BEiT v2",
            found=lambda vit: vit.pos_embed is None,
            arguments=lambda network: {"pos_embed": "none"},
        ),
        Component(
            "attention_pool",
            "The output is pooled by one learned query that attends to all tokens, in place of class token or mean.",
            "Zhai et al. 2022, Scaling Vision Transformers, section 3.1; used by SigLIP",
            found=lambda vit: vit.attn_pool is not None,
            arguments=lambda network: {"global_pool": "map"},
            parameters=("attn_pool.",),
        ),
    )
}


def resolve(names: Iterable[str]) -> list[Component]:
    """The components of the given names. Raises ValueError that names an unknown one."""
    out = []
    for name in names:
        if name not in COMPONENTS:
            raise ValueError(f"unknown component {name!r}{suggest(name, COMPONENTS)} (known: {', '.join(COMPONENTS)})")
        out.append(COMPONENTS[name])
    return out


def inspect(vit: VisionTransformer) -> tuple[str, ...]:
    """The names of the native components that a built network has."""
    return tuple(sorted(name for name, component in COMPONENTS.items() if component.found(vit)))
