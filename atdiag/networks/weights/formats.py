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
==========  ===================================================================================================

If a file holds two networks, the one marked above is taken. If it holds a moving average besides the weights
(``state_dict_ema``, ``model_ema`` ...), the weights are taken unless the average is requested, which is part of a run's
spec (``Teacher.branch``); :attr:`Converted.averages` names the averages in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from atdiag.core.text import shortlist
from atdiag.networks.weights.sources import WeightsError

_ANCHOR = "patch_embed.proj.weight"
_CONTAINERS = ("teacher", "student", "state_dict", "model", "module")
_AVERAGES = (
    *(
        "state_dict_ema",
        "model_ema",
        "ema",
        "ema_state_dict",
        "model_ema_state_dict",
        "ema_model",
        "state_dict_average",
    ),
    *("average", "averaged_model"),
)
"""Names of entries that hold a moving average of the weights: timm's, DeiT's, and others'."""
_PREFIXES = ("module.base_encoder.", "module.momentum_encoder.", "module.backbone.", "backbone.", "module.", "")

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
    """Entries of the file that hold a moving average of the network's weights."""


def convert(contents: Mapping[str, Any], branch: Literal["weights", "ema"] = "weights") -> Converted:
    """Return the network in a checkpoint, whose format is recognised by its keys.

    branch: the raw weights, or their moving average. Raises WeightsError, listing the keys in the file, if it holds no
    ViT; and if it lacks the requested branch.
    """
    averages = tuple(name for name in _AVERAGES if _holds_vit(contents.get(name)))
    if branch == "ema" and not averages:
        raise WeightsError(
            f"the file holds no moving average of the weights; it has {shortlist(map(str, contents))}", "leave #ema out"
        )
    container, tensors = _unwrap(contents, averages if branch == "ema" else (*_CONTAINERS, ""), averages)
    prefix = _prefix_of(tensors)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside = [key for key in tensors if not key.startswith(prefix)]
    found = _format(container, prefix, state)
    inside = [key for key in state if re.match(_DROPPED[found], key)]
    state = _renamed(found, {key: value for key, value in state.items() if key not in inside})
    where = f"{container}: {prefix}*" if container else f"{prefix}*"
    return Converted(state, found, where, (*outside, *(prefix + key for key in inside)), averages)


def _prefix_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of the network's keys: one of the formats' prefixes, or that of the only network in the file.

    Raises WeightsError, listing the prefixes, for a file with several networks under unknown prefixes.
    """
    found = [key.removesuffix(_ANCHOR) for key in tensors if key.endswith(_ANCHOR)]
    known = [prefix for prefix in _PREFIXES if prefix in found]
    if not known and len(found) > 1:
        raise WeightsError(
            f"the file holds {len(found)} networks, with keys that begin with {shortlist(map(repr, found))}",
            "save the state dict of one of them",
        )
    return (known or found)[0]


def _tensors(entry: Any) -> dict[str, Tensor]:
    """Return the tensors of an entry by name; empty unless it is a dictionary of tensors."""
    if not isinstance(entry, Mapping):
        return {}
    return {str(key): value for key, value in entry.items() if isinstance(value, Tensor)}


def _holds_vit(entry: Any) -> bool:
    return any(key.endswith(_ANCHOR) for key in _tensors(entry))


def _unwrap(
    contents: Mapping[str, Any], names: Sequence[str], averages: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """Return the dictionary of tensors in a checkpoint, and the entry that held it (empty at the top level)."""
    for name in names:
        entry = contents.get(name) if name else contents
        if _holds_vit(entry):
            return name, _tensors(entry)
    if averages:
        raise WeightsError(f"the file holds a moving average alone ({averages[0]})", "add #ema to its name to use that")
    raise WeightsError(f"no ViT is in the file: no key ends in {_ANCHOR!r}; it has {shortlist(map(str, contents))}")


def _format(container: str, prefix: str, state: Mapping[str, Tensor]) -> str:
    if prefix in ("module.base_encoder.", "module.momentum_encoder."):
        return "mocov3"
    if prefix in ("module.backbone.", "backbone.") or container in ("teacher", "student") or "masked_embed" in state:
        return "dino"
    if _SHARED_TABLE in state:
        return "beit"
    if any(key.startswith("decoder_") for key in state):
        return "mae"
    if "register_tokens" in state or ("mask_token" in state and "blocks.0.ls1.gamma" in state):
        return "dinov2"
    if "blocks.0.gamma_1" in state and "pos_embed" in state and "blocks.0.attn.qkv.bias" in state:
        return "deit3"
    return "timm"


def _renamed(found: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if found == "beit":
        table = state.pop(_SHARED_TABLE)
        blocks = sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}, key=int)
        # All blocks use the one table, so copy it to each block.
        state |= {f"blocks.{block}.attn.relative_position_bias_table": table for block in blocks}
    elif found == "deit3":
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()}
    elif found == "dinov2" and "register_tokens" in state and "cls_token" in state and "pos_embed" in state:
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
    side, grid = _grid_of(name, tensor, wanted, model), tuple(model.patch_embed.grid_size)
    if side is None or (side, side) == grid:
        return tensor
    out: Tensor
    if name == "pos_embed":
        out = resample_abs_pos_embed(tensor, list(grid), num_prefix_tokens=_prefix(model))
    else:
        out = resize_rel_pos_bias_table(tensor, new_window_size=grid, new_bias_shape=tuple(wanted.shape))
    return out
