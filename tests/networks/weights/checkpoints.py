"""Checkpoints in the published key layouts, written from small random networks."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from atdiag.networks.timm import architectures
from atdiag.networks.weights.sources import Source

SIZE = 64
_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
VIT = Source("small", "vit_small_patch16_224", _VIT, (0.5,) * 3, (0.5,) * 3)
HEADED = replace(VIT, arguments={**_VIT, "num_classes": 7})
DINOV2 = replace(VIT, model="vit_small_patch14_dinov2", arguments={**_VIT, "patch_size": 16})
REGISTERS = replace(DINOV2, model="vit_small_patch14_reg4_dinov2")
DEIT3 = replace(VIT, model="deit3_small_patch16_224")
BEIT = replace(VIT, model="beitv2_base_patch16_224", arguments={**_VIT, "global_pool": "token"})
FINE_TUNED = replace(BEIT, arguments={**_VIT, "num_classes": 7})
SIGLIP = replace(VIT, model="vit_base_patch16_siglip_224")


def drawn(source, size=SIZE, seed=0):
    """Make a network in which every weight matters."""
    model = architectures.build(source, size, meta=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def junk(*names):
    return {name: torch.ones(3, 3) for name in names}


def other(state):
    return {key: value + 1 for key, value in state.items()}


def mocov3(state):
    return {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": {
            **prefixed("module.base_encoder.", {**state, **junk("head.0.weight", "head.1.running_mean")}),
            **prefixed("module.momentum_encoder.", {**other(state), **junk("head.0.weight")}),
            **junk("module.predictor.0.weight"),
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }


def mocov3_momentum(state):
    """Write a checkpoint from which the base encoder was removed."""
    return {"state_dict": prefixed("module.momentum_encoder.", {**state, **junk("head.0.weight")})}


def dino(state):
    import argparse

    heads = junk("head.mlp.0.weight", "head.last_layer.weight_g")
    return {
        "student": {**prefixed("module.backbone.", other(state)), **prefixed("module.", heads)},
        "teacher": {**prefixed("backbone.", state), **heads},
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "epoch": 800,
    }


def dino_student(state):
    return {"student": {**prefixed("module.backbone.", state), **prefixed("module.", junk("head.mlp.0.weight"))}}


def ibot(state):
    """The extracted backbone."""
    return {"state_dict": {**state, **junk("masked_embed")}}


def mae(state):
    return {"model": state}


def mae_full(state):
    return {"model": {**state, **junk("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")}}


def beitv2(state):
    table = "attn.relative_position_bias_table"
    tables = [key for key in state if key.endswith(table)]
    rest = {key: value for key, value in state.items() if key not in tables}
    return {
        "model": {
            **rest,
            "rel_pos_bias.relative_position_bias_table": state[tables[0]],
            "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
            **junk("mask_token", "lm_head.weight", "cls_pt_layers.0.norm1.weight"),
        }
    }


def beit_fine_tuned(state):
    return {"module": {**state, "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}}


def dinov2(state):
    return {**state, **junk("mask_token")}


def dinov2_registers(state):
    """The authors give the class token a position of its own."""
    state = dict(state)
    position = torch.linspace(-1, 1, state["cls_token"].shape[-1]).expand_as(state["cls_token"])
    return {
        **junk("mask_token"),
        "register_tokens": state.pop("reg_token"),
        "cls_token": state.pop("cls_token") - position,
        "pos_embed": torch.cat([position, state.pop("pos_embed")], dim=1),
        **state,
    }


def deit3(state):
    return {"model": {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}}


def plain(state):
    return state


@dataclass(frozen=True)
class Layout:
    """How to write a checkpoint from a network, and what the loader must find in it."""

    write: Any
    source: Source
    format: str
    branch: str
    dropped: tuple[str, ...] = ()
    """Some of the keys that are no part of the network."""


LAYOUTS = {
    "timm": Layout(plain, HEADED, "timm", "*"),
    "timm-siglip": Layout(plain, SIGLIP, "timm", "*"),
    "timm-registers": Layout(plain, REGISTERS, "timm", "*"),
    "deit": Layout(mae, HEADED, "timm", "model: *"),
    "mocov3": Layout(
        *(mocov3, VIT, "mocov3", "state_dict: module.base_encoder.*"),
        ("module.base_encoder.head.0.weight", "module.momentum_encoder.cls_token", "module.predictor.0.weight"),
    ),
    "mocov3-momentum": Layout(
        *(mocov3_momentum, VIT, "mocov3", "state_dict: module.momentum_encoder.*"),
        ("module.momentum_encoder.head.0.weight",),
    ),
    "dino": Layout(dino, VIT, "dino", "teacher: backbone.*", ("head.mlp.0.weight",)),
    "dino-student": Layout(dino_student, VIT, "dino", "student: module.backbone.*", ("module.head.mlp.0.weight",)),
    "ibot": Layout(ibot, VIT, "dino", "state_dict: *", ("masked_embed",)),
    "mae": Layout(mae, VIT, "timm", "model: *"),
    "mae-decoder": Layout(mae_full, VIT, "mae", "model: *", ("decoder_blocks.0.norm1.weight", "mask_token")),
    "beitv2": Layout(
        *(beitv2, BEIT, "beit", "model: *"),
        ("mask_token", "lm_head.weight", "cls_pt_layers.0.norm1.weight", "rel_pos_bias.relative_position_index"),
    ),
    "beit-fine-tuned": Layout(
        beit_fine_tuned, FINE_TUNED, "timm", "module: *", ("blocks.0.attn.relative_position_index",)
    ),
    "dinov2": Layout(dinov2, DINOV2, "dinov2", "*", ("mask_token",)),
    "dinov2-registers": Layout(dinov2_registers, REGISTERS, "dinov2", "*", ("mask_token",)),
    "deit3": Layout(deit3, replace(DEIT3, arguments={**_VIT, "num_classes": 7}), "deit3", "model: *"),
}


def network(layout, size=SIZE):
    """Make the network behind a checkpoint; for self-supervised BEiT, with one bias table for all blocks."""
    model = drawn(layout.source, size)
    if layout.write is beitv2:
        for block in model.blocks[1:]:
            block.attn.relative_position_bias_table.data = model.blocks[0].attn.relative_position_bias_table.data
    return model


def write(layout, model, path, change=None):
    """Write a network's checkpoint; ``change`` corrupts its state dict in place before the layout is applied."""
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if change:
        change(state)
    contents = layout.write(state)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in contents.items()}, path)
    else:
        torch.save(contents, path)
    return path
