"""Positions that act on the map: BEiT's relative position bias, and rotary embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import apply_rot_embed_cat, create_rope_embed, gen_relative_position_index
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    get_mixed_freqs,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from atdiag.core.spec import Network
from atdiag.core.spec.network import Value


class RelPosBias(nn.Module):
    """BEiT's relative position bias: a learned value for each head and each offset between patches.

    Returns [H, N, N] for the whole token sequence. The class token has three values (to it, from it, with itself), as
    in BEiT; registers, which have no position, get zero bias.
    """

    index: Tensor
    places: Tensor

    def __init__(self, grid: int, class_token: bool, registers: int, heads: int) -> None:
        super().__init__()
        rows = (2 * grid - 1) ** 2 + 3 * class_token
        # timm's name, so that the keys of a BEiT checkpoint match.
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        index = gen_relative_position_index((grid, grid), class_token=class_token)
        self.register_buffer("index", index, persistent=False)
        self.registers = registers
        patches, prefix = grid**2, int(class_token)
        # Indices of the tokens with a bias: a buffer, since a copy to a GPU at each step would block.
        places = torch.tensor([*range(prefix), *range(prefix + registers, prefix + registers + patches)])
        self.register_buffer("places", places, persistent=False)

    def forward(self) -> Tensor:
        """Return the bias [H, N, N]."""
        bias = self.relative_position_bias_table[self.index.flatten()]
        bias = bias.view(*self.index.shape, -1).permute(2, 0, 1)
        if not self.registers:
            return bias.contiguous()
        full = bias.new_zeros(bias.shape[0], *(size + self.registers for size in bias.shape[1:]))
        heads = torch.arange(bias.shape[0], device=bias.device)[:, None, None]
        return full.index_put((heads, self.places[:, None], self.places), bias)


TEMPERATURE = {"cat": 10000.0, "dinov3": 100.0, "mixed": 10.0}
"""Kind of rotary embedding -> the base of its frequencies, unless the value ``temperature`` says otherwise."""


def rotary(network: Network) -> nn.Module:
    """Build timm's module that makes a network's rotary embedding, from the values of its component ``rope``."""
    own = network.own("rope")
    kind = str(own.get("kind", "cat"))
    options: dict[str, Any] = {
        "dim": network.width,
        "num_heads": network.heads,
        "feat_shape": [network.grid, network.grid],
        "temperature": float(own.get("temperature", TEMPERATURE[kind])),
        "grid_indexing": str(own.get("indexing", "ij")),
        "rotate_half": bool(own.get("half", False)),
    }
    if kind == "mixed":
        options["depth"] = network.depth
    else:
        options["grid_offset"] = float(own.get("offset", 0.0))
    if kind == "cat":
        reference = own.get("reference")
        options |= {"in_pixels": False, "ref_feat_shape": None if reference is None else [int(reference)] * 2}
    module: nn.Module = create_rope_embed(rope_type=kind, **options)
    return module


def rotary_values(model: Any) -> dict[str, Value]:
    """Return what a network's rotary embedding is like, where it differs from the defaults."""
    rope = model.rope
    kind = _KINDS[type(rope)]
    found: dict[str, Value] = {
        "kind": kind,
        "temperature": float(rope.temperature),
        "indexing": rope.grid_indexing,
        "half": bool(getattr(rope, "rotate_half", False)),
        "offset": float(getattr(rope, "grid_offset", 0.0)),
    }
    default: dict[str, Value] = {"kind": "cat", "temperature": TEMPERATURE[kind], "indexing": "ij", "half": False}
    if (shape := getattr(rope, "ref_feat_shape", None)) is not None:
        found["reference"] = int(shape[0])
    default |= {"offset": 0.0}
    return {name: value for name, value in found.items() if default.get(name) != value}


_KINDS = {RotaryEmbeddingCat: "cat", RotaryEmbeddingDinoV3: "dinov3", RotaryEmbeddingMixed: "mixed"}


def is_known_rotary(model: Any) -> bool:
    """Return whether a network has a rotary embedding that :func:`rotary` can build."""
    rope = getattr(model, "rope", None)
    if type(rope) not in _KINDS:
        return False
    shapes = [getattr(rope, name, None) for name in ("feat_shape", "ref_feat_shape")]
    usual = {"grid_type": "index", "normalize_coords": "separate", "min_period": None, "max_period": None}
    return all(shape is None or len(set(shape)) == 1 for shape in shapes) and all(
        getattr(rope, name, value) == value for name, value in usual.items()
    )


class Rotary(nn.Module):
    """A hook on q and k (``Attention.qk_hooks``) that rotates those of the patches by their position.

    Class token and registers keep theirs, as in timm. Frequencies that are learned belong to the network, which holds
    those of all blocks in one parameter, under timm's name.
    """

    embedding: Tensor | None

    def __init__(self, rope: nn.Module, block: int, network: Network) -> None:
        super().__init__()
        self.prefix, self.block = network.prefix_tokens, block
        self.rotate_half = bool(network.own("rope").get("half", False))
        learned = isinstance(rope, RotaryEmbeddingMixed)
        # In a tuple, so that it is no part of this module too, whose weights would be stored for each block.
        self.shared: tuple[nn.Module, ...] = (rope,) if learned else ()
        fixed = None if learned else rope.get_embed()  # type: ignore[operator]
        self.register_buffer("embedding", fixed, persistent=False)

    def forward(self, x: Tensor, name: str, heads: Tensor | None) -> Tensor:
        """Rotate q or k [B, h, N, d]; heads: the indices [h] of its heads, None for all."""
        embedding = self._embedding(heads)
        patches = apply_rot_embed_cat(x[:, :, self.prefix :], embedding, half=self.rotate_half)
        return torch.cat([x[:, :, : self.prefix], patches.to(x.dtype)], dim=2)

    def _embedding(self, heads: Tensor | None) -> Tensor:
        """Return sines and cosines: [N, 2 d], or for learned frequencies [h, N, 2 d]."""
        if self.embedding is not None:
            return self.embedding
        (rope,) = self.shared
        own: Tensor = get_mixed_freqs(rope.freqs[:, self.block], rope.t_x, rope.t_y)  # type: ignore[index]
        return own if heads is None else own[heads]


def attach_rotary(vit: VisionTransformer, network: Network) -> None:
    """Give a network rotary embedding in every block."""
    vit.rope = rotary(network)
    for index, block in enumerate(vit.blocks):
        # timm's names of the places before the rotation, where what is not normed can be read.
        for name in ("q_norm", "k_norm"):
            if not hasattr(block.attn, name):
                setattr(block.attn, name, nn.Identity())
        block.attn.qk_hooks["rope"] = Rotary(vit.rope, index, network)


def draw_frequencies(
    name: str, shape: tuple[int, ...], network: Network, generator: np.random.Generator
) -> NDArray[np.float32] | None:
    """Draw learned frequencies [2, depth, heads, d / 2] as their authors do: fixed sizes, a random angle per head."""
    if name != "rope.freqs":
        return None
    width = network.width // network.heads
    base = float(network.own("rope").get("temperature", TEMPERATURE["mixed"]))
    size = base ** (-np.arange(0, width, 4) / width)
    angle = 2 * np.pi * generator.random((network.depth, network.heads, 1))
    axes = [np.concatenate([size * f(angle), size * f(angle + np.pi / 2)], axis=-1) for f in (np.cos, np.sin)]
    return np.stack(axes).astype(np.float32)
