"""The components that act around the map: on what a block does with its output, on the MLP, and outside blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.layers import AttentionPoolLatent, GluMlp, Mlp, PatchEmbed, RmsNorm, SwiGLU
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import nn

from atdiag.core.spec import PLAIN_NORM_EPS, Network
from atdiag.core.spec.network import Value
from atdiag.networks.model import readout
from atdiag.networks.model.blocks import PostNormBlock
from atdiag.networks.model.component import (
    RMS_EPS,
    Component,
    attention,
    branch_scales,
    first_block,
    has,
    is_there,
    layer_norms,
    norm_layer,
    patch_embedding,
    qkv_biases,
    renamed,
    without,
)

POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock, PostNormBlock)
"""Blocks that norm a branch's output in place of its input."""


# --- LayerScale ----------------------------------------------------------------------------------------------------


def _scaled_branches(model: Any) -> dict[str, Value]:
    attn, mlp = (scale is not None for scale in branch_scales(first_block(model)))
    values: dict[str, Value] = {} if attn and mlp else {"branch": "attn" if attn else "mlp"}
    return values | ({"frozen": True} if any(getattr(m, "frozen", False) for m in model.modules()) else {})


def _fit_scales(vit: VisionTransformer, network: Network) -> None:
    """Take the LayerScale of the other branch away, if only one is to have it; freeze it, if it is to stay as it is."""
    own = network.own("layer_scale")
    for block in vit.blocks:
        if (branch := own.get("branch")) is not None:
            setattr(block, "ls2" if branch == "attn" else "ls1", nn.Identity())
        for scale in (block.ls1, block.ls2):
            if own.get("frozen") and not isinstance(scale, nn.Identity):
                scale.gamma.requires_grad_(False)
                scale.frozen = True


def _scales_by_block(
    name: str, shape: tuple[int, ...], network: Network, generator: np.random.Generator
) -> NDArray[np.float32] | None:
    """Return the initial LayerScale of a block that has one of its own; None for all other parameters."""
    if not name.endswith(".gamma"):
        return None
    value = network.own("layer_scale").get(f"block_{name.split('.')[1]}")
    return None if value is None else np.full(shape, value, np.float32)


# --- MLP -----------------------------------------------------------------------------------------------------------


def _mlp(model: Any) -> Any:
    return getattr(first_block(model), "mlp", None)


def _activation(kind: str, approximate: str | None = None) -> Callable[[Any], bool]:
    """Return a predicate: whether the MLPs of a network are plain and have an activation."""

    def found(model: Any) -> bool:
        act = getattr(_mlp(model), "act", None)
        return type(_mlp(model)) is Mlp and (
            type(act).__name__ == kind or (approximate is not None and getattr(act, "approximate", None) == approximate)
        )

    return found


def _is_swiglu(model: Any) -> bool:
    mlp = _mlp(model)
    return isinstance(getattr(mlp, "act", None), nn.SiLU) and (
        type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last)
    )


def _swiglu_values(model: Any) -> dict[str, Value]:
    return {"packed": True} if type(_mlp(model)) is GluMlp else {}


def _gated_mlp(network: Network) -> dict[str, Any]:
    """Make gated MLPs with as many weights as the plain ones of the network's ``mlp_ratio``."""

    def build(in_features: int, hidden_features: int, act_layer: Any, **options: Any) -> nn.Module:
        hidden = round(hidden_features * 2 / 3)
        if network.own("swiglu").get("packed"):
            packed: nn.Module = GluMlp(in_features, 2 * hidden, act_layer=nn.SiLU, gate_last=False, **options)
            return packed
        apart: nn.Module = SwiGLU(in_features, hidden, **options)
        return apart

    return {"mlp_layer": build}


def _draw_halves(
    name: str, shape: tuple[int, ...], network: Network, generator: np.random.Generator
) -> NDArray[np.float32] | None:
    """Draw gate and value of a packed gated MLP as two matrices, as if they were not packed."""
    if not (network.own("swiglu").get("packed") and name.startswith("blocks.") and name.endswith("mlp.fc1.weight")):
        return None
    bound = (6 / (shape[1] + shape[0] // 2)) ** 0.5
    values: NDArray[np.float32] = np.float32(bound) * (2 * generator.random(shape, dtype=np.float32) - 1)
    return values


# --- norms and biases ----------------------------------------------------------------------------------------------


def _rms_norms(model: nn.Module) -> list[RmsNorm]:
    return [m for m in model.modules() if isinstance(m, RmsNorm)]


def _is_rms_normed(model: Any) -> bool:
    norms = _rms_norms(model)
    return (
        bool(norms)
        and not layer_norms(model)
        and len({norm.eps for norm in norms}) == 1
        and all(norm.weight is not None for norm in norms)
    )


def _rms_values(model: nn.Module) -> dict[str, Value]:
    eps = float(_rms_norms(model)[0].eps)
    return {} if eps == RMS_EPS else {"eps": eps}


def _lacks_projection_biases(model: Any) -> bool:
    attn, mlp = attention(model), _mlp(model)
    biases = [getattr(m, "bias", None) for m in (mlp or nn.Identity()).children() if isinstance(m, nn.Linear)]
    return attn is not None and attn.proj.bias is None and not any(bias is not None for bias in biases)


# --- pooling -------------------------------------------------------------------------------------------------------


def _norms(model: Any) -> list[str]:
    return [name for name in ("norm", "fc_norm") if is_there(model, name)]


def _is_averaged(model: Any) -> bool:
    return getattr(model, "global_pool", None) == "avg"


COMPONENTS = (
    Component(
        "layer_scale",
        "A learned factor per channel on each residual branch. It starts small (0.1 to 1e-6), so that every block "
        "starts near the identity, which lets deep networks train. The value 'branch' says which branch has it, if "
        "only one; 'frozen', that it stays at its initial value, a constant gain; 'block_0', 'block_1', ... are the "
        "initial values of single blocks.",
        "Touvron et al. 2021, Going deeper with Image Transformers (CaiT), section 2",
        found=lambda model: any(scale is not None for scale in branch_scales(first_block(model))),
        values=_scaled_branches,
        arguments=lambda network: {"init_values": network.layer_scale_init},
        attach=_fit_scales,
        drawn=_scales_by_block,
        keys=renamed({"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}),
        parameters=("ls1.", "ls2."),
        initial=lambda network: {"gamma": network.layer_scale_init},
    ),
    Component(
        "registers",
        "Extra learned tokens that belong to no patch and are dropped at the output. They take over the role of the "
        "few patch tokens of high norm that large networks otherwise use to hold global information. Positions are "
        "then given to patches alone, as in DINOv2 with registers.",
        "Darcet et al. 2024, Vision Transformers Need Registers, section 2",
        found=has("reg_token"),
        arguments=lambda network: {"reg_tokens": network.registers, "no_embed_class": True},
        parameters=("reg_token",),
    ),
    Component(
        "distillation_token",
        "A second class token with a head of its own, whose prediction is averaged with the class token's; in DeiT's "
        "pre-training that head learned from a teacher's predictions. In a student both heads learn the labels.",
        "Touvron et al. 2021, DeiT, section 3",
        found=has("dist_token"),
        arguments=lambda network: {"reg_tokens": network.registers},
        attach=readout.attach_distillation_token,
        explains=frozenset({"distillation_token"}),
        parameters=("dist_token", "head_dist."),
    ),
    Component(
        "pre_norm",
        "A norm on the embedded tokens before the first block, beside the usual ones within the blocks.",
        "Radford et al. 2021, CLIP, section 2.4",
        found=has("norm_pre"),
        arguments=lambda network: {"pre_norm": True},
        parameters=("norm_pre.",),
    ),
    Component(
        "patch_norm",
        "A norm on the embedded patches, before positions are added and without the other tokens.",
        "Fini et al. 2025, AIMv2 (published code)",
        found=lambda model: is_there(model.patch_embed, "norm"),
        arguments=lambda network: {"embed_norm_layer": norm_layer(network)},
        explains=frozenset({"patch_norm"}),
        parameters=("patch_embed.norm.",),
    ),
    Component(
        "no_patch_bias",
        "The patch embedding has no bias. Before position embeddings a bias is redundant for the patches, whose "
        "positions can hold it.",
        "Radford et al. 2021, CLIP (published code)",
        found=lambda model: isinstance(model.patch_embed, PatchEmbed) and model.patch_embed.proj.bias is None,
        arguments=lambda network: {"embed_layer": patch_embedding(bias=False)},
    ),
    Component(
        "quick_gelu",
        "The activation x * sigmoid(1.702 x) in place of GELU, which it approximates.",
        "Hendrycks and Gimpel 2016, GELUs, section 2; used by CLIP's published weights",
        found=_activation("QuickGELU"),
        arguments=lambda network: {"act_layer": "quick_gelu"},
    ),
    Component(
        "gelu_tanh",
        "GELU by a formula with tanh, which it equals within 5e-4.",
        "Hendrycks and Gimpel 2016, GELUs, section 2; used by SigLIP's published weights",
        found=_activation("GELUTanh", approximate="tanh"),
        arguments=lambda network: {"act_layer": "gelu_tanh"},
        explains=frozenset({"gelu_tanh"}),
    ),
    Component(
        "swiglu",
        "A gated MLP: one projection, passed through SiLU, multiplies another. It is two thirds as wide as the "
        "standard student's plain MLP, so that its three matrices have as many weights as that one's two. The value "
        "'packed' says that timm keeps both projections in one matrix.",
        "Shazeer 2020, GLU Variants Improve Transformer; for ViTs Fang et al. 2023, EVA-02",
        found=_is_swiglu,
        values=_swiglu_values,
        arguments=_gated_mlp,
        drawn=_draw_halves,
        explains=frozenset({"swiglu"}),
        parameters=("mlp.fc1_g.", "mlp.fc1_x."),
        replaces=("mlp.",),
    ),
    Component(
        "mlp_norm",
        "A norm within the MLP, after the activation (or the gate).",
        "Shleifer et al. 2021, NormFormer; for ViTs Wang et al. 2023, BEiT-3, and Fang et al. 2023, EVA-02",
        found=lambda model: is_there(_mlp(model), "norm"),
        arguments=lambda network: {"scale_mlp_norm": True},
        explains=frozenset({"mlp_norm"}),
        parameters=("mlp.norm.",),
    ),
    Component(
        "attn_norm",
        "A norm within attention, on the heads' joined outputs before the output projection.",
        "Wang et al. 2022, Foundation Transformers (sub-LayerNorm); for ViTs Wang et al. 2023, BEiT-3",
        found=lambda model: is_there(attention(model), "norm"),
        arguments=lambda network: {"scale_attn_norm": True},
        explains=frozenset({"attn_norm"}),
        parameters=("attn.norm.",),
    ),
    Component(
        "post_norm",
        "The norm of each branch comes after it, before it is added to the stream, in place of before it.",
        "Liu et al. 2022, Swin Transformer V2, section 3.2; for EVA in Sun et al. 2023, EVA-CLIP",
        found=lambda model: isinstance(first_block(model), POST_NORM),
        arguments=lambda network: {"block_fn": PostNormBlock},
        explains=frozenset({"post_norm"}),
    ),
    Component(
        "rms_norm",
        "RMSNorm in place of LayerNorm, everywhere: it divides by the root of the mean square, subtracts no mean, and "
        "has no bias. The value 'eps' is its epsilon.",
        "Zhang and Sennrich 2019, Root Mean Square Layer Normalization; for ViTs Fini et al. 2025, AIMv2",
        found=_is_rms_normed,
        values=_rms_values,
        explains=frozenset({"no_layer_norm"}),
    ),
    Component(
        "ln_eps",
        "An epsilon of every LayerNorm other than the plain ViT's 1e-6 (CLIP: 1e-5). It matters where tokens have "
        "little variance, as embedded patches at the start of training have.",
        "Radford et al. 2021, CLIP (published code: torch's default)",
        found=lambda model: any(norm.eps != PLAIN_NORM_EPS for norm in layer_norms(first_block(model))),
    ),
    Component(
        "no_qkv_bias",
        "Queries, keys and values have no bias. That of the values adds a constant to every token, which the bias of "
        "the output projection can hold.",
        "Chowdhery et al. 2022, PaLM, section 2; used by DINOv3 (Simeoni et al. 2025), whose keys have none",
        found=lambda model: not any(qkv_biases(attention(model))),
        arguments=lambda network: {"qkv_bias": False},
        explains=frozenset({"no_qkv_bias"}),
    ),
    Component(
        "no_proj_bias",
        "Neither the output projection of attention nor the MLP has a bias.",
        "Chowdhery et al. 2022, PaLM, section 2; for ViTs Fini et al. 2025, AIMv2",
        found=_lacks_projection_biases,
        arguments=lambda network: {"proj_bias": False},
        explains=frozenset({"no_proj_bias", "no_mlp_bias"}),
    ),
    Component(
        "no_abs_pos",
        "No absolute position embedding: where a patch is shows in relative positions alone, if at all.",
        "Bao et al. 2022, BEiT, as fine-tuned and as in BEiT v2",
        found=without("pos_embed"),
        arguments=lambda network: {"pos_embed": "none"},
    ),
    Component(
        "mean_pool",
        "The output is the mean of the patch tokens, normed after pooling, although there is a class token: that takes "
        "part in attention and is read by nothing.",
        "Bao et al. 2022, BEiT, as fine-tuned on image classification",
        found=lambda model: not without("cls_token")(model) and _is_averaged(model),
        arguments=lambda network: {"global_pool": "avg"},
        parameters=("fc_norm.",),
    ),
    Component(
        "norm_before_pool",
        "Tokens are normed before they are averaged; the plain way is to norm their mean. It acts only where the "
        "output is such a mean.",
        "Zhai et al. 2022, Scaling Vision Transformers (published code)",
        found=lambda model: _is_averaged(model) and _norms(model) == ["norm"],
        arguments=lambda network: {"fc_norm": False},
        explains=frozenset({"norm_before_pool"}),
    ),
    Component(
        "no_last_norm",
        "There is no norm after the last block: what the blocks leave in the stream is read as it is.",
        "Bolya et al. 2025, Perception Encoder (spatial and language); Ranzinger et al. 2024, AM-RADIO",
        found=lambda model: not _norms(model),
        arguments=lambda network: {"final_norm": False},
        explains=frozenset({"no_last_norm"}),
    ),
    Component(
        "pool_includes_prefix",
        "Pooling takes class token and registers in, beside the patches. It acts only where the output is pooled over "
        "tokens.",
        "timm (option pool_include_prefix)",
        found=lambda model: getattr(model, "pool_include_prefix", False) and not getattr(model, "pools_all", False),
        arguments=lambda network: {"pool_include_prefix": True},
        explains=frozenset({"pool_includes_prefix"}),
    ),
    Component(
        "attention_pool",
        "The output is pooled by one learned query that attends to all patches, in place of class token or mean. "
        "Values say where it is not as wide as the blocks ('heads', 'hidden': its MLP's) or takes all tokens "
        "('prefix').",
        "Zhai et al. 2022, Scaling Vision Transformers, section 3.1; used by SigLIP",
        found=lambda model: isinstance(getattr(model, "attn_pool", None), AttentionPoolLatent),
        values=readout.pool_values,
        arguments=lambda network: {"global_pool": "map"},
        attach=readout.attach_pool,
        parameters=("attn_pool.",),
    ),
    Component(
        "no_class_token",
        "There is no class token: the sequence is patches (and registers) alone, and the output is pooled over them.",
        "Zhai et al. 2022, Scaling Vision Transformers, section 3.1; used by SigLIP",
        found=without("cls_token"),
        arguments=lambda network: {"class_token": False},
        followed=True,
    ),
)
