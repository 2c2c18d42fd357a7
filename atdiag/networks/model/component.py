"""What a native component is, and what the definitions of components share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.layers import PatchEmbed, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.core.spec.network import Value


@dataclass(frozen=True)
class Component:
    """One native component.

    summary: a description of its function, in a paragraph. source: the publication that describes it.
    found: predicate on a built network, one of ours or timm's ``VisionTransformer``, ``Beit`` or ``Eva``. It must check
        every block if the component explains a difference, since nothing else does then.
    arguments: changes to the arguments of timm's ``VisionTransformer``.
    attach: adds or removes parts after the network is built. Components are attached in the order of their names.
    keys: renames its weights in a timm state dict to our names, in place, if they differ; called with the state dict
        and the description of the network. Must leave our own state dicts unchanged (:func:`renamed` makes such a
        function).
    explains: names of ``Network.differences`` that this component accounts for: a network that has the component no
        longer counts as different in these respects, so a student can be given them.
    belongs_to_map: whether it acts only on q, k or the logits, so that a copied map includes its whole effect.
    parameters: fragments of the names of its parameters.
    initial: constant initial values of its parameters, by the last part of their name, where these differ from the
        general rules (``students.initialise``).
    drawn: random initial values of its parameters where these differ from the general rules: name, shape, network and
        generator -> the values, or None for a parameter that is not the component's.
    values: what it is like on a built network that has it, where that differs from the component's defaults; stored as
        ``Network.values`` and read by ``Network.own``.
    replaces: fragments of the names of parameters that networks without it have too, but for another purpose or in
        another shape: nothing passes between such parameters when a student starts from a teacher.
    followed: whether every student of a teacher has it, so that it can't be chosen (see the module).
    """

    name: str
    summary: str
    source: str
    found: Callable[[nn.Module], bool]
    arguments: Callable[[Network], dict[str, Any]] = lambda network: {}
    attach: Callable[[VisionTransformer, Network], None] = lambda vit, network: None
    keys: Callable[[dict[str, Tensor], Network], None] = lambda state, network: None
    explains: frozenset[str] = frozenset()
    belongs_to_map: bool = False
    parameters: tuple[str, ...] = field(default=())
    initial: Callable[[Network], dict[str, float | None]] = lambda network: {}
    drawn: Callable[[str, tuple[int, ...], Network, np.random.Generator], NDArray[np.float32] | None] = (
        lambda name, shape, network, generator: None
    )
    values: Callable[[nn.Module], dict[str, Value]] = lambda model: {}
    replaces: tuple[str, ...] = field(default=())
    followed: bool = False


def patch_embedding(bias: bool) -> Callable[..., PatchEmbed]:
    """Return timm's patch embedding class, with or without a bias regardless of the rest of the network.

    timm ties the bias to the norm before the blocks (``bias=not pre_norm``); here each is a separate component.
    """

    def build(*args: Any, **options: Any) -> PatchEmbed:
        return PatchEmbed(*args, **{**options, "bias": bias})

    return build


def branch_scales(block: Any) -> list[Tensor | None]:
    """Return the scales of a block's two residual branches (attention, MLP), under either of timm's names."""
    own = [getattr(getattr(block, name, None), "gamma", None) for name in ("ls1", "ls2")]
    return [getattr(block, f"gamma_{n}", None) if scale is None else scale for n, scale in enumerate(own, start=1)]


def qkv_biases(attn: Any) -> tuple[bool, bool, bool]:
    """Return which of q, k, v have a bias, in our attention module or timm's (where BEiT's k has a buffer of zeros)."""
    fused = getattr(attn, "qkv", None)
    if fused is not None and fused.bias is not None:
        return True, True, True
    parts = ((getattr(attn, f"{n}_bias", None), getattr(attn, f"{n}_proj", None)) for n in "qkv")
    q, k, v = (isinstance(own, nn.Parameter) or (proj is not None and proj.bias is not None) for own, proj in parts)
    return q, k, v


def layer_norms(module: nn.Module) -> list[nn.LayerNorm]:
    """Return all LayerNorms of a network."""
    return [m for m in module.modules() if isinstance(m, nn.LayerNorm)]


def renamed(names: Mapping[str, str]) -> Callable[[dict[str, Tensor], Network], None]:
    """Make a function for ``Component.keys`` that renames parts of every block.

    names: timm's name of a parameter or a module within a block -> ours (``{"gamma_1": "ls1.gamma"}``).
    """

    def rename(state: dict[str, Tensor], network: Network) -> None:
        for block, (old, new) in product(range(network.depth), names.items()):
            at = f"blocks.{block}.{old}"
            for key in [key for key in state if key == at or key.startswith(f"{at}.")]:
                state[f"blocks.{block}.{new}{key.removeprefix(at)}"] = state.pop(key)

    return rename


def first_block(model: Any) -> Any:
    """Return a network's first block."""
    return model.blocks[0]


def attention(model: Any) -> Any:
    """Return the attention of a network's first block; None if the block has no such module."""
    return getattr(first_block(model), "attn", None)


def is_there(module: Any, name: str) -> bool:
    """Return whether a module has a part of that name that is neither None nor an identity."""
    return not isinstance(getattr(module, name, None), nn.Identity | None)


def has(name: str) -> Callable[[Any], bool]:
    """Return a predicate: whether a network has a part of that name."""
    return lambda model: is_there(model, name)


def without(name: str) -> Callable[[Any], bool]:
    """Return a predicate: whether a network has no part of that name."""
    return lambda model: getattr(model, name, None) is None


def norm_layer(network: Network) -> Callable[..., nn.Module]:
    """Return the class of a network's norms: LayerNorm, or RMSNorm for the component ``rms_norm``."""
    if "rms_norm" in network.components:
        eps = float(network.own("rms_norm").get("eps", RMS_EPS))
        return lambda width, **options: RmsNorm(width, eps=eps, **options)
    return lambda width, **options: nn.LayerNorm(width, eps=network.norm_eps, **options)


RMS_EPS = 1e-6
"""RMSNorm's epsilon, unless the component's value ``eps`` says otherwise: timm's default."""
