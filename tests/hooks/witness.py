"""What plain PyTorch hooks see of a network, by the names of hook points: no nnsight, none of our own reading."""

import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ARCHITECTURES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "eva02_base_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_small_patch16_36x1_224": {},
    "vit_base_patch16_siglip_224": {},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_base_patch16_rope_224": {},
    "vit_base_patch16_rope_mixed_224": {},
    "vit_so150m_patch16_reg4_gap_256": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_giant_patch14_dinov2": {},
    "eva_giant_patch14_224": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_base_patch16_gap_224": {},
    "vit_base_patch16_xp_224": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_tiny_patch16_224.qk_norm": {"qk_norm": True},
    "vit_tiny_patch16_224.swiglu": {"init_values": 0.5, "scale_attn_norm": True, "scale_mlp_norm": True},
}
QUICK = list(ARCHITECTURES)[:4]


class Kernels(TorchFunctionMode):
    """Note the arguments and results of scaled dot-product attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append((*args[:3], (kwargs or {}).get("attn_mask"), out))
        return out


def seen(subject, model, images):
    """Return what plain hooks see, by name, for a timm network with fused attention; and its output."""
    found, handles, post = {}, [], not hasattr(model.blocks[0], "in_norm") and "Post" in type(model.blocks[0]).__name__

    def keep(module, name, side, form=lambda x: x):
        if side == "input":
            hook = module.register_forward_pre_hook(lambda _, args: found.__setitem__(name, form(args[0].detach())))
        else:
            hook = module.register_forward_hook(lambda _, args, out: found.__setitem__(name, form(out.detach())))
        handles.append(hook)

    keep(model.head, "unembed.hook_in", "input")
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}"
        keep(block, f"{at}.hook_resid_pre", "input")
        keep(block, f"{at}.hook_resid_post", "output")
        if not hasattr(block, "attn"):  # parallel branches
            keep(block.in_norm, f"{at}.ln1", "input")
            continue
        keep(block.mlp if post else block.norm2, f"{at}.hook_resid_mid", "input")
        keep(block.attn, f"{at}.attn.hook_out", "output")
        keep(block.mlp, f"{at}.mlp.hook_out", "output")
        keep(block.mlp.fc2, f"{at}.mlp.hook_post", "input")
        if type(block.mlp).__name__ == "Mlp":
            keep(block.mlp.fc1, f"{at}.mlp.hook_pre", "output")
        for n, norm in ((1, block.norm1), (2, block.norm2)):
            keep(norm, f"{at}.ln{n}", "input")
    with torch.no_grad(), Kernels() as kernels:
        out = subject.module(images)
    for handle in handles:
        handle.remove()
    for i, (q, k, v, mask, z) in enumerate(kernels.calls[: len(model.blocks)]):
        at = f"blocks.{i}.attn"
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        found |= {f"{at}.hook_attn_scores": scores, f"{at}.hook_pattern": scores.softmax(-1)}
        for name, x in (("score_q", q), ("score_k", k), ("v", v), ("z", z)):
            found[f"{at}.hook_{name}"] = x.transpose(1, 2)
    for name in [name for name in found if name.endswith(("ln1", "ln2"))]:
        x = found.pop(name)
        block = model.blocks[int(name.split(".")[1])]
        norm = block.in_norm if hasattr(block, "in_norm") else block.norm1
        eps = norm.eps
        if "Rms" in type(norm).__name__:
            found[f"{name}.hook_scale"] = (x.square().mean(-1, keepdim=True) + eps).sqrt()
            found[f"{name}.hook_normalized"] = F.rms_norm(x, x.shape[-1:], eps=eps)
            continue
        found[f"{name}.hook_scale"] = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        found[f"{name}.hook_normalized"] = F.layer_norm(x, x.shape[-1:], eps=eps)
    for i in range(len(model.blocks)):
        at = f"blocks.{i}.hook_"
        if f"{at}resid_mid" in found:
            found[f"{at}attn_out"] = found[f"{at}resid_mid"] - found[f"{at}resid_pre"]
            found[f"{at}mlp_out"] = found[f"{at}resid_post"] - found[f"{at}resid_mid"]
    found["unembed.hook_out"] = out
    return found, out
