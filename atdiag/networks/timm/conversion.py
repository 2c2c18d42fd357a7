"""Convert a network built by timm to our representation: a description, and an equivalent ViT of ours.

:func:`describe` returns a network's architecture; :func:`convert` rebuilds it from our modules, so that a teacher's map
and a student's come from the same code; :func:`teacher_from` does both, and wraps a network that has differences
unmodified (:class:`~atdiag.networks.timm.wrapping.Foreign`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.networks.model import components
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.inspection import describe
from atdiag.networks.timm.wrapping import Foreign


@torch.no_grad()
def convert(model: nn.Module, network: Network) -> ViT:
    """Return our ViT with a network's weights: same tokens after the last norm and same logits, in float32.

    network: its architecture from :func:`describe`, without differences. Exact re-parametrisations, where the two
    parametrise one function differently:

    - no position embedding for the class token (DeiT III): add a row of zeros;
    - a position embedding for registers: add its rows to the registers, and the class token's row to the class token;
    - one table of relative position biases for all blocks: copy it to each block;
    - a norm after pooling the class token: move it before;
    - no head: add one class with zero weights.

    Raises ValueError, listing the keys, for weights without a parameter or parameters without a weight.
    """
    if network.differences:
        raise ValueError(f"it has {', '.join(network.differences)}, so no ViT of ours computes the same function")
    vit = ViT(network)
    own, state = vit.state_dict(), _translated(model, network, has_fc_norm="fc_norm.weight" in vit.state_dict())
    faults = {
        "no weights for": sorted(own.keys() - state.keys()),
        "no place for": sorted(state.keys() - own.keys()),
        "another shape of": [
            f"{name} ({tuple(state[name].shape)} for {tuple(own[name].shape)})"
            for name in sorted(own.keys() & state.keys())
            if own[name].shape != state[name].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{what} {', '.join(names)}" for what, names in faults.items() if names)
        raise ValueError(f"the weights of {type(model).__name__} do not fit its description: {told}")
    vit.load_state_dict(state)
    return vit


def _translated(model: nn.Module, network: Network, has_fc_norm: bool) -> dict[str, Tensor]:
    """Return a network's state dict under our keys."""
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    for component in components.resolve(network.components):
        component.keys(state, network)
    for block in range(network.depth):
        _join_projections(state, f"blocks.{block}.attn")
    for kind in ("weight", "bias"):
        names = f"norm.{kind}", f"fc_norm.{kind}"
        _rename(state, *(names if has_fc_norm else reversed(names)))
    _place_positions(state, network)
    if not any(name.startswith("head.") for name in state):
        state |= {"head.weight": torch.zeros(1, network.width), "head.bias": torch.zeros(1)}
    return state


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    if old in state and new not in state:
        state[new] = state.pop(old)


def _join_projections(state: dict[str, Tensor], attn: str) -> None:
    """Merge separate q, k and v projections (some of timm's EVA models) into one, with the biases that exist."""
    weights = [f"{attn}.{n}_proj.weight" for n in "qkv"]
    if weights[0] not in state:
        return
    state[f"{attn}.qkv.weight"] = torch.cat([state.pop(name) for name in weights])
    biases = {n: state.pop(name) for n in "qkv" if (name := f"{attn}.{n}_proj.bias") in state}
    if len(biases) == 3:
        state[f"{attn}.qkv.bias"] = torch.cat([biases[n] for n in "qkv"])
    else:
        state |= {f"{attn}.{n}_bias": bias for n, bias in biases.items()}


def _place_positions(state: dict[str, Tensor], network: Network) -> None:
    """Convert position embeddings to our layout: class token and patches, or with registers patches alone."""
    if "pos_embed" not in state:
        return
    positions = state["pos_embed"]
    first = positions.shape[1] - network.grid**2
    if "distillation_token" in network.components:
        return  # timm's layout: class token, distillation token, patches
    wanted = 0 if network.registers else int(network.class_token)
    if first == wanted:
        return
    if first == 0:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :wanted]), positions], dim=1)
    elif first == network.prefix_tokens:
        if network.class_token:
            state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["reg_token"] = state["reg_token"] + positions[:, int(network.class_token) : first]
        state["pos_embed"] = positions[:, first:]


def teacher_from(
    model: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> ViT | Foreign:
    """Return a network as a teacher, frozen and in eval mode: as our ViT if possible, else wrapped unmodified.

    Both take images [B, channels, S, S] in [0, 1] and provide maps. Raises UserError as :func:`describe`.
    """
    network = describe(model, mean, std)
    build: Callable[[nn.Module, Network], ViT | Foreign] = Foreign if network.differences else convert
    teacher = build(model, network)
    teacher.eval().requires_grad_(False)
    return teacher
