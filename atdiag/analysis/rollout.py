"""Attention rollout: the share of each input token in each token of a layer, if only attention mixed tokens.

After Abnar & Zuidema 2020 (Quantifying attention flow in transformers): the map averaged over heads and mixed half and
half with the identity for the residual connection, multiplied over the layers from the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def steps(maps: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the rollout up to each layer, [B, N, N], from maps [B, H, N, N] in order from the first layer.

    Rows sum to one: row i holds the shares of the input tokens in token i after that layer.
    """
    rolled: Tensor | None = None
    for p in maps:
        mixed = (p.mean(1) + torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
        yield rolled


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """Return the rollout over all layers [B, N, N]. Raises ValueError if there are none."""
    last: Tensor | None = None
    for last in steps(maps):  # noqa: B007
        pass
    if last is None:
        raise ValueError("a rollout needs the maps of at least one layer")
    return last
