"""From a network that timm has built to our world: what it is, and the same function as a ViT of ours.

:func:`describe` says what a network is; :func:`convert` rebuilds it from our modules, so that a teacher's map and a
student's come from the same code; :func:`teacher_from` does both, and lets a network that has differences teach as it
is (:class:`~atdiag.networks.timm.wrapping.Foreign`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.inspection import describe
from atdiag.networks.timm.wrapping import Foreign


@torch.no_grad()
def convert(model: nn.Module, network: Network) -> ViT:
    """Our ViT with a network's weights: the same tokens after the last norm and the same logits, in float32.

    network: what :func:`describe` says of it, without differences. Exact re-parametrisations, where a network and ours
    write one function in two ways:

    - no position embedding for the class token (DeiT III): a row of zeros;
    - one for registers: added to the registers, and the class token's row to the class token;
    - one table of relative position biases for all blocks: a copy in each;
    - a norm after the class token is read: before it;
    - no head: one class with weights of zero.

    Raises ValueError that lists the keys where a weight has no place, or a parameter no weight.
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
    """A network's state dict under our keys."""
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    table = "relative_position_bias_table"
    shared = state.pop(f"rel_pos_bias.{table}", None)
    for i in range(network.depth):
        at = f"blocks.{i}"
        _join_projections(state, f"{at}.attn")
        for old, new in (
            (f"{at}.gamma_1", f"{at}.ls1.gamma"),
            (f"{at}.gamma_2", f"{at}.ls2.gamma"),
            (f"{at}.attn.{table}", f"{at}.attn.rel_pos_bias.{table}"),
        ):
            _rename(state, old, new)
        if shared is not None:
            key = f"{at}.attn.rel_pos_bias.{table}"
            state[key] = state[key] + shared if key in state else shared
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
    """Separate projections of q, k and v (some of timm's EVA) -> one, and the biases that there are."""
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
    """Position embeddings of the tokens that ours gives one: class token and patches, or patches beside registers."""
    if "pos_embed" not in state:
        return
    positions = state["pos_embed"]
    first = positions.shape[1] - network.grid**2
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
    """A network as a teacher, frozen and in eval mode: ours where it can be, else as it is.

    Either way it takes images [B, channels, S, S] in [0, 1] and gives maps. Raises UserError as :func:`describe`.
    """
    network = describe(model, mean, std)
    build: Callable[[nn.Module, Network], ViT | Foreign] = Foreign if network.differences else convert
    teacher = build(model, network)
    teacher.eval().requires_grad_(False)
    return teacher
