"""The components of the map: those that act on q, k or the attention logits alone, so that a copied map has them."""

from __future__ import annotations

from typing import Any

from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.networks.model import positions
from atdiag.networks.model.component import Component, attention, has, is_there, qkv_biases, renamed
from atdiag.networks.model.positions import RelPosBias


def _has_position_bias(model: Any) -> bool:
    # In BEiT it may be one table shared by all blocks, held by the network.
    tables = (getattr(attention(model), name, None) for name in ("rel_pos_bias", "relative_position_bias_table"))
    return has("rel_pos_bias")(model) or any(table is not None for table in tables)


def _attach_position_bias(vit: VisionTransformer, network: Network) -> None:
    for block in vit.blocks:
        block.attn.rel_pos_bias = RelPosBias(network.grid, network.class_token, network.registers, network.heads)


def _give_tables(state: dict[str, Tensor], network: Network) -> None:
    """Convert the position biases of timm's BEiT to ours: to a block's own table the one shared by all is added."""
    table = "relative_position_bias_table"
    renamed({f"attn.{table}": f"attn.rel_pos_bias.{table}"})(state, network)
    shared = state.pop(f"rel_pos_bias.{table}", None)
    if shared is not None:
        for key in (f"blocks.{block}.attn.rel_pos_bias.{table}" for block in range(network.depth)):
            state[key] = state[key] + shared if key in state else shared


def _detach_k_bias(vit: VisionTransformer, network: Network) -> None:
    for block in vit.blocks:
        block.attn.register_parameter("k_bias", None)


def _normed_alike(model: Any) -> bool:
    """Return whether q and k each have a norm, of the kind that the rest of the network has."""
    attn = attention(model)
    if not (is_there(attn, "q_norm") and is_there(attn, "k_norm")):
        return False
    kind = RmsNorm if any(isinstance(m, RmsNorm) for m in model.modules()) else nn.LayerNorm
    return isinstance(attn.q_norm, kind) and isinstance(attn.k_norm, kind)


COMPONENTS = (
    Component(
        "rel_pos_bias",
        "A learned bias on the attention logits for each head and each offset between two patches.",
        "Shaw et al. 2018; in this form Bao et al. 2022, BEiT, after Raffel et al. 2020",
        found=_has_position_bias,
        attach=_attach_position_bias,
        keys=_give_tables,
        belongs_to_map=True,
        parameters=("rel_pos_bias.",),
    ),
    Component(
        "no_k_bias",
        "Queries and values have a bias, keys none. A bias of the keys adds the same number to all logits of a query, "
        "so softmax does not see it: the maps that can be had are the same, with fewer parameters.",
        "Bao et al. 2022, BEiT (published code)",
        found=lambda model: qkv_biases(attention(model)) == (True, False, True),
        attach=_detach_k_bias,
        belongs_to_map=True,
        parameters=("attn.q_bias", "attn.v_bias"),
    ),
    Component(
        "rope",
        "Rotary position embedding: the channels of queries and keys, in pairs, are rotated by angles proportional to "
        "their patch's row or column, so that a logit depends on the offset between two patches. Class token and "
        "registers are not rotated. The value 'kind' says which angles: 'cat' counts patches (EVA-02), 'dinov3' "
        "takes coordinates in [-1, 1], and in 'mixed' frequencies are learned for each head and block. What DINOv3 "
        "does to coordinates in its own pre-training (shift, jitter, rescaling) is left out.",
        "Su et al. 2021, RoFormer; along two axes Fang et al. 2023, EVA-02; mixed: Heo et al. 2024, section 3.2",
        found=positions.is_known_rotary,
        values=positions.rotary_values,
        attach=positions.attach_rotary,
        drawn=positions.draw_frequencies,
        explains=frozenset({"rope"}),
        belongs_to_map=True,
    ),
    Component(
        "qk_norm",
        "A norm on the queries and one on the keys of each head, before the logits and before any rotation. It bounds "
        "the logits, whose growth makes the training of large networks diverge.",
        "Henry et al. 2020; for ViTs Dehghani et al. 2023, ViT-22B, section 2",
        found=_normed_alike,
        arguments=lambda network: {"qk_norm": True},
        explains=frozenset({"qk_norm"}),
        belongs_to_map=True,
        parameters=("attn.q_norm.", "attn.k_norm."),
    ),
)
