"""Convert authors' checkpoints to timm's names: find the network in the file and rename its keys.

==========  ===================================================================================================
``timm``    timm's own names; also DeiT's, AugReg's and extracted backbones, at the top or under ``model``,
            ``state_dict``
``mocov3``  ``state_dict``: ``module.base_encoder.*`` (taken) or ``module.momentum_encoder.*``; heads, predictor
``dino``    DINO and iBOT, which continues its code: ``teacher`` (taken) or ``student``: ``[module.]backbone.*``,
            ``[module.]head.*``; iBOT's extracted backbone has ``masked_embed``
``mae``     ``model``: timm's names, and ``mask_token``, ``decoder_*`` in the full checkpoint
``beit``    BEiT and BEiT v2, self-supervised: ``model``: one ``rel_pos_bias`` table for all blocks, ``mask_token``,
            ``lm_head``, ``cls_pt_layers``; ends in ``norm``
``dinov2``  ``mask_token``; with registers: ``register_tokens``, and the class token's position is apart
``deit3``   LayerScale is called ``gamma_1``, ``gamma_2``
``hf_*``    Hugging Face's transformers, see ``transformers_keys``
==========  ===================================================================================================

Which network is taken from a file with several, and under which wrappers it is found, is told in ``finding``. The
choice of another (``FILE#ema``, ``FILE#student``) is part of a run's spec (``Teacher.branch``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from atdiag.core.text import shortlist
from atdiag.networks.weights import finding, transformers_keys
from atdiag.networks.weights.finding import Location
from atdiag.networks.weights.sources import Branch, WeightsError

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"

_DROPPED = {
    "timm": r".*relative_position_index$|pre_logits\.",
    "mocov3": r"head\.\d+\.",
    "dino": r"head\.|masked_embed$",
    "mae": r"mask_token$|decoder_",
    "beit": r"mask_token$|lm_head\.|cls_pt_|.*relative_position_index$",
    "dinov2": r"mask_token$",
    "deit3": r"$^",
}
"""Format -> regular expression for the network's keys that only pre-training uses (matched from the start)."""


@dataclass(frozen=True)
class Converted:
    """A checkpoint's network under timm's names."""

    state: dict[str, Tensor]
    format: str
    branch: str
    """Its place in the file: ``state_dict: module.base_encoder.*``."""
    dropped: tuple[str, ...]
    """Keys of the file that are not part of it (pre-training heads, decoders, mask tokens, the other branch)."""
    averages: tuple[str, ...] = ()
    """Names in the file that mark a moving average of the network's weights."""
    others: tuple[str, ...] = ()
    """Places of other networks in the file, which are no averages."""
    note: str = ""
    """Which network was taken from a file that holds several; empty for other files."""


def convert(contents: Mapping[str, Any], branch: Branch = "weights") -> Converted:
    """Return the network in a checkpoint, whose format is recognised by its keys.

    branch: which of several networks, see ``finding``. Raises WeightsError, listing the keys in the file, if it holds
    no ViT; and if it lacks the requested branch.
    """
    choice = finding.choose(contents, branch)
    place = choice.place
    prefix, tensors = place.prefix, place.tensors
    others = tuple(map(str, choice.others))
    if place.transformers:
        found, state, used = transformers_keys.converted(tensors, prefix)
        dropped = tuple(key for key in tensors if key not in used)
        return Converted(_renamed(found, state), found, str(place), dropped, choice.averages, others, choice.note)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside = [key for key in tensors if not key.startswith(prefix)]
    found = _format(place, state)
    inside = [key for key in state if re.match(_DROPPED[found], key)]
    state = _renamed(found, {key: value for key, value in state.items() if key not in inside})
    dropped = (*outside, *(prefix + key for key in inside))
    return Converted(state, found, str(place), dropped, choice.averages, others, choice.note)


def _format(place: Location, state: Mapping[str, Tensor]) -> str:
    names = place.names
    if "base_encoder" in names or "momentum_encoder" in names:
        return "mocov3"
    if "register_tokens" in state or ("mask_token" in state and "blocks.0.ls1.gamma" in state):
        return "dinov2"
    pair = "teacher" in names or "student" in names
    # A linear head inside a backbone is a classifier, which DINO's is not: it has an MLP.
    if pair or "masked_embed" in state or ("backbone" in names and "head.weight" not in state):
        return "dino"
    if _SHARED_TABLE in state:
        return "beit"
    if any(key.startswith("decoder_") for key in state):
        return "mae"
    if "blocks.0.gamma_1" in state and "pos_embed" in state and "blocks.0.attn.qkv.bias" in state:
        return "deit3"
    return "timm"


def _renamed(found: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if found in ("beit", "hf_beit") and _SHARED_TABLE in state:
        table = state.pop(_SHARED_TABLE)
        blocks = sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}, key=int)
        # All blocks use the one table, so copy it to each block.
        state |= {f"blocks.{block}.attn.relative_position_bias_table": table for block in blocks}
    elif found == "deit3":
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()}
    elif (
        found in ("dinov2", "hf_dinov2")
        and "register_tokens" in state
        and "cls_token" in state
        and "pos_embed" in state
    ):
        # With registers, timm has positions for patches alone: add the class token's to the token.
        position = state.pop("pos_embed")
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:]
        state["reg_token"] = state.pop("register_tokens")
    return state


# --- onto a network ------------------------------------------------------------------------------------------------


def fit(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Fit a checkpoint's weights to a timm network of any image size: strictly, in float32.

    Position embeddings and tables of relative position biases are resampled to the network's grid by timm's functions
    (bicubic), if it differs from the checkpoint's. ``model`` may be on the meta device.

    Raises WeightsError, listing keys that are missing, left over, of another shape, or with values that are not finite.
    """
    wanted = model.state_dict()
    if faults := _faults(state, wanted, model):
        raise WeightsError("; ".join(faults))
    # Copy, since the tensors may be mapped from a file that someone can write to.
    whole = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    ready = {name: _resampled(name, tensor, wanted[name], model) for name, tensor in whole.items()}
    if broken := [name for name, tensor in ready.items() if not bool(tensor.isfinite().all())]:
        raise WeightsError(f"NaN or infinite values in {shortlist(broken)}")
    return ready


def _faults(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: Any) -> list[str]:
    """Return the mismatches, one phrase for each kind, from names and shapes alone."""
    missing = [name for name in wanted if name not in state]
    left = [name for name in state if name not in wanted]
    shapes, kinds = [], []
    for name, tensor in state.items():
        if name not in wanted or _grid_of(name, tensor, wanted[name], model) is not None:
            continue
        if tensor.shape != wanted[name].shape:
            shapes.append(f"{name} ({_by(tensor)} in the file, {_by(wanted[name])} in the network)")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            kinds.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            kinds.append(f"{name} (fewer values in the file than its shape says)")
    found = (("missing", missing), ("left over", left), ("of another shape", shapes), ("no plain weights", kinds))
    return [f"{what}: {shortlist(names)}" for what, names in found if names]


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one value"


def _prefix(model: Any) -> int:
    """Return the number of prefix tokens that have a position."""
    return 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)


def _grid_of(name: str, tensor: Tensor, wanted: Tensor, model: Any) -> int | None:
    """Return the side of the patch grid of a position embedding or bias table, if its shape allows one."""
    if name == "pos_embed" and tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]:
        side = math.isqrt(max(tensor.shape[1] - _prefix(model), 0))
        return side if side and side**2 + _prefix(model) == tensor.shape[1] else None
    if name.endswith("relative_position_bias_table") and tensor.ndim == 2 and tensor.shape[1] == wanted.shape[1]:
        side = (math.isqrt(max(tensor.shape[0] - 3, 0)) + 1) // 2
        return side if side and (2 * side - 1) ** 2 + 3 == tensor.shape[0] else None
    return None


def _resampled(name: str, tensor: Tensor, wanted: Tensor, model: Any) -> Tensor:
    side = _grid_of(name, tensor, wanted, model)
    if side is None:
        return tensor
    grid = tuple(model.patch_embed.grid_size)
    if (side, side) == grid:
        return tensor
    out: Tensor
    if name == "pos_embed":
        out = resample_abs_pos_embed(tensor, list(grid), num_prefix_tokens=_prefix(model))
    else:
        out = resize_rel_pos_bias_table(tensor, new_window_size=grid, new_bias_shape=tuple(wanted.shape))
    return out
