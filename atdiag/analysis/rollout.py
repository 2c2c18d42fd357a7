"""Attention rollout: how much of each input token reaches each token of a layer, if only attention moved anything.

After Abnar & Zuidema 2020 (Quantifying attention flow in transformers): the map averaged over heads, half of it
replaced by the identity for the residual connection, multiplied over the layers from the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def steps(maps: Iterable[Tensor]) -> Iterator[Tensor]:
    """Maps [B, H, N, N] of the layers from the first on -> the rollout up to each of them, [B, N, N].

    Rows sum to one: row i says of which input tokens token i is made after that layer.
    """
    rolled: Tensor | None = None
    for p in maps:
        mixed = (p.mean(1) + torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
        yield rolled


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """The rollout over all layers [B, N, N]. Raises ValueError where there is no layer."""
    last: Tensor | None = None
    for last in steps(maps):  # noqa: B007
        pass
    if last is None:
        raise ValueError("a rollout needs the maps of at least one layer")
    return last
