"""Convert a network of Hugging Face's transformers to timm's names, by the table ``transformers.toml``.

Its q, k and v are separate linear layers, its class token and position embedding may lack timm's leading dimensions,
and its classifier stands beside the network (``classifier.weight`` beside ``vit.*``). What timm's classes have no place
for is left out and listed: the pooler of ``ViTModel``, CLIP's projection, DINOv2's classifier on two features.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from atdiag.core.text import shortlist
from atdiag.networks.weights.sources import WeightsError

PREFIX = "hf_"
"""Names of these layouts begin with it: ``hf_vit``."""


@dataclass(frozen=True)
class KeyLayout:
    """A row of the table."""

    name: str
    marks: tuple[str, ...]
    rules: tuple[tuple[re.Pattern[str], str], ...]
    beside: tuple[tuple[re.Pattern[str], str], ...]
    types: tuple[str, ...]
    """``model_type`` of its ``config.json``."""
    heads: int
    eps: float
    act: str
    """The last three: defaults of a ``config.json`` that leaves them out."""
    pixels: str | None = None
    """The family's normalisation of pixels, if all published networks of it have the same."""


@cache
def layouts() -> tuple[KeyLayout, ...]:
    """Return the table's layouts, in the order in which they are tried."""
    table = tomllib.loads(Path(__file__).with_name("transformers.toml").read_text())

    def rules(names: list[str], layer: str) -> tuple[tuple[re.Pattern[str], str], ...]:
        found = [rule for name in names for rule in table["rules"][name]]
        return tuple((re.compile(pattern.replace("{layer}", table["layer"][layer])), new) for pattern, new in found)

    out = []
    for name, row in table["layout"].items():
        facts = {key: row[key] for key in ("heads", "eps", "act", "pixels") if key in row}
        own, beside = (rules(row[key], row["layer"]) for key in ("rules", "beside"))
        out.append(KeyLayout(PREFIX + name, tuple(row["marks"]), own, beside, tuple(row["types"]), **facts))
    return tuple(out)


def layout(name: str) -> KeyLayout | None:
    """Return a layout by its name; None if it is not one of transformers'."""
    return next((one for one in layouts() if one.name == name), None)


def recognised(keys: Iterable[str]) -> KeyLayout:
    """Return the layout of a network's keys. Raises WeightsError if they are of another network."""
    keys = list(keys)
    for one in layouts():
        if all(any(re.fullmatch(mark, key) for key in keys) for mark in one.marks):
            return one
    raise WeightsError(
        f"its keys are of transformers, and of none of {', '.join(map(_plainly, layouts()))} ({shortlist(keys)})",
        "save the ViT's own state dict, best under timm's names",
    )


def converted(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, dict[str, Tensor], set[str]]:
    """Return the layout of the network under a prefix, its state under timm's names, and the keys that it is made of.

    Raises WeightsError, listing them, for keys under the prefix that the layout lacks, and for shapes that do not go
    together.
    """
    own = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    above = prefix.removesuffix(".").rpartition(".")[0]
    parent = f"{above}." if above else ""
    beside = {} if not prefix else {k.removeprefix(parent): k for k in tensors if k.startswith(parent)}
    kind = recognised(own)
    names = {key: _name(short, kind.rules) for short, key in own.items()}
    if unknown := [key for key, name in names.items() if name is None]:
        raise WeightsError(f"keys that transformers' {_plainly(kind)} does not have: {shortlist(unknown)}")
    names |= {key: name for short, key in beside.items() if key not in names and (name := _name(short, kind.beside))}
    places = {name: key for key, name in names.items() if name}
    _choose_head(places, tensors)
    try:
        state = _joined({name: tensors[key] for name, key in places.items()})
    except RuntimeError as fault:  # of torch.cat, for unequal widths
        raise WeightsError(f"the shapes of its q, k and v do not go together ({fault})") from None
    if kind.name == "hf_deit" and "head.weight" in state and "head_dist.weight" not in state:
        # Its classifier reads the class token alone, which makes the distillation token a register.
        state["reg_token"] = state.pop("dist_token")
    return kind.name, state, set(places.values())


def _plainly(one: KeyLayout) -> str:
    return one.name.removeprefix(PREFIX)


def _name(key: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str | None:
    """Return timm's name of a key; empty for one that is not used, None for an unknown one."""
    return next((found.expand(new) for pattern, new in rules if (found := pattern.fullmatch(key))), None)


def _choose_head(places: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Remove, from timm's name -> key, a head that timm's classes lack, or what the head goes around."""
    if "head.weight" not in places:
        return
    head, width = tensors[places["head.weight"]], tensors[places["patch_embed.proj.weight"]].shape[0]
    if head.ndim != 2 or head.shape[1] != width:  # DINOv2's reads the class token and the mean patch
        unused = ("head.",)
    elif "norm_pre.weight" in places:  # CLIP's reads the mean of patches before the last norm
        unused = ("norm.",)
    else:  # SigLIP's reads the mean of patches, not the attention pooling
        unused = ("attn_pool.",)
    for name in [name for name in places if name.startswith(unused)]:
        del places[name]


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join separate projections, split joint ones, and restore leading dimensions, as timm has them."""
    for part in [key.removesuffix("q.weight") for key in state if key.endswith(".attn.q.weight")]:
        for kind in ("weight", "bias"):
            names = [f"{part}{letter}.{kind}" for letter in "qkv"]
            if all(name in state for name in names):
                state[f"{part}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])
            elif kind == "bias" and names[1] not in state:  # BEiT's keys have none
                state |= {f"{part}{one}_bias": state.pop(n) for one, n in zip("qkv", names, strict=True) if n in state}
    for key in [key for key in state if ".mlp.gate." in key]:
        up = key.replace(".gate.", ".up.")
        if up in state:
            state[key.replace(".gate.", ".fc1.")] = torch.cat([state.pop(key), state.pop(up)])
    for kind in ("weight", "bias"):
        if (joint := state.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            third = len(joint) // 3
            state |= {f"attn_pool.q.{kind}": joint[:third], f"attn_pool.kv.{kind}": joint[third:]}
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state and state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    return state
