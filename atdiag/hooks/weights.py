"""A network's weights in TransformerLens's names and shapes.

Shapes: L layers, H heads, C width (d_model), d head width, M hidden width of the MLP, N tokens. LayerScale is folded
into W_O, b_O, W_out and b_out, which is exact: ``z @ W_O`` summed over heads, plus ``b_O``, is ``hook_attn_out``. The
weights of norms are left where they are. A bias that the network lacks is zero. Values are those of the network, in
its dtype; gradients flow to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from atdiag.analysis.points.parts import positions
from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.networks.model import components
from atdiag.networks.timm import inspection


def part(model: Any, network: Network, name: str) -> Tensor:
    """Return a weight by its name in TransformerLens. Raises UserError, saying why, where the network has none."""
    if name in _OUTSIDE:
        return _OUTSIDE[name](model, network)
    found = [_of_block(block, network, name) for block in model.blocks]
    if len({one.shape for one in found}) > 1:
        raise UserError(f"there is no one {name}: its shape differs between blocks")
    return torch.stack(found)


def _of_block(block: Any, network: Network, name: str) -> Tensor:
    kind, _, of = name.partition("_")
    if of in ("Q", "K", "V"):
        weight, bias, heads = _projection(block, network, of.lower())
        if kind == "b":
            return _or_zero(bias, weight[:, 0]).view(heads, -1)
        return weight.view(heads, -1, weight.shape[-1]).transpose(1, 2)
    if isinstance(block, inspection.PARALLEL):
        raise UserError(f"there is no {name}: its blocks compute attention and MLP side by side")
    if of == "O":
        return _branch(block, network, block.attn.proj, 0, kind, network.heads)
    return _mlp(block, network, kind, of)


def _projection(block: Any, network: Network, n: str) -> tuple[Tensor, Tensor | None, int]:
    """Return weight [H d, C], bias [H d] and number of heads of q, k or v."""
    place = "qkv".index(n)
    if isinstance(block, inspection.PARALLEL):
        rows = block.in_proj.weight.split(block.in_split)[1 + place]
        bias = block.in_proj.bias
        return rows, None if bias is None else bias.split(block.in_split)[1 + place], network.heads
    attn = block.attn
    own = getattr(attn, f"{n}_bias", None)
    if (weight := getattr(attn, f"{n}_weight", None)) is not None:  # our module
        return weight, own, network.heads
    if (linear := getattr(attn, f"{n}_proj", None)) is not None:
        heads = network.heads if n == "q" else int(getattr(attn, "num_kv_heads", network.heads))
        return linear.weight, linear.bias, heads
    if getattr(attn, "qkv", None) is None:
        raise UserError(f"the weights of its attention ({type(attn).__name__}) are of no known layout")
    fused = attn.qkv.bias
    return attn.qkv.weight.chunk(3)[place], own if fused is None else fused.chunk(3)[place], network.heads


def _branch(block: Any, network: Network, linear: nn.Linear, branch: int, kind: str, heads: int = 0) -> Tensor:
    """Return the weight [M, C] (of heads: [H, d, C]) or the bias [C] of a branch's last layer, LayerScale folded in."""
    scale = None if isinstance(block, inspection.POST_NORM) else components.branch_scales(block)[branch]
    if kind == "b":
        bias = _or_zero(linear.bias, linear.weight[:, 0])
        return bias if scale is None else scale * bias
    weight = linear.weight if scale is None else scale[:, None] * linear.weight
    return weight.T.reshape(heads, -1, len(weight)) if heads else weight.T


def _mlp(block: Any, network: Network, kind: str, of: str) -> Tensor:
    mlp = block.mlp
    if of == "out":
        return _branch(block, network, mlp.fc2, 1, kind)
    if isinstance(mlp, SwiGLU):
        linear = mlp.fc1_g if of == "gate" else mlp.fc1_x
        weight, bias = linear.weight, linear.bias
    elif isinstance(mlp, GluMlp):
        half = int((of == "gate") == mlp.gate_last)
        weight = mlp.fc1.weight.chunk(2)[half]
        bias = None if mlp.fc1.bias is None else mlp.fc1.bias.chunk(2)[half]
    elif of == "gate":
        raise UserError(f"there is no {kind}_gate: its MLP is not gated")
    else:
        weight, bias = mlp.fc1.weight, mlp.fc1.bias
    return _or_zero(bias, weight[:, 0]) if kind == "b" else weight.T


def _or_zero(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias


def _head(model: Any) -> nn.Linear:
    if not isinstance(model.head, nn.Linear):
        raise UserError("it has no classifying head")
    if inspection.distilled(model):
        raise UserError("it has two heads, of the class token and of the distillation token")
    return model.head


def _position(model: Any) -> Tensor:
    if getattr(model, "pos_embed", None) is None:
        raise UserError("there is no W_pos: it has no absolute position embedding")
    return positions(model)[0]


_OUTSIDE: dict[str, Callable[[Any, Network], Tensor]] = {
    "W_E": lambda model, network: model.patch_embed.proj.weight.flatten(1).T,
    "b_E": lambda model, network: _or_zero(model.patch_embed.proj.bias, model.patch_embed.proj.weight.flatten(1)[:, 0]),
    "W_pos": lambda model, network: _position(model),
    "W_U": lambda model, network: _head(model).weight.T,
    "b_U": lambda model, network: _or_zero(_head(model).bias, _head(model).weight[:, 0]),
}

NAMES = (
    *_OUTSIDE,
    *(f"{kind}_{of}" for kind in "Wb" for of in ("Q", "K", "V", "O", "in", "gate", "out")),
)
"""W_Q, W_K, W_V [L, H, C, d] and b_Q ... [L, H, d]; W_O [L, H, d, C], b_O [L, C]; W_in, W_gate [L, C, M], b_in, b_gate
[L, M]; W_out [L, M, C], b_out [L, C]; W_E [channels * patch * patch, C], b_E [C]; W_pos [N, C]; W_U [C, classes], b_U
[classes]."""
