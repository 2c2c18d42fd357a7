"""Attention maps of chosen queries over the image, by subject, layer and head.

>>> from atdiag.analysis import images, maps, subjects
>>> from atdiag.core.spec import Data
>>> teacher, data = subjects.find("deit_s"), Data(name="digits", train=1, clutter=6)
>>> pictures = images.choose("0,1", data, teacher.network)
>>> shown = maps.maps(teacher, pictures, layers=(0, 11), queries=("centre", "cls"), heads="all")
>>> shown.attention.shape, shown.rollout.shape
((2, 2, 2, 2, 5, 5), (2, 2, 5, 5))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from atdiag.analysis import rollout, streaming, tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network

if TYPE_CHECKING:
    import pandas as pd

Heads = Literal["mean", "all"] | int
"""The mean over heads, every head, or one."""

WORDS = ("centre", "cls")


@dataclass(frozen=True)
class Shown:
    """One subject's attention over the image.

    n images, L layers, Q queries, H heads shown (1 for the mean), g x g patches.

    Maps hold the attention weights on patches without renormalising them: the remainder is on the class token and the
    registers (``elsewhere``).
    """

    label: str
    network: Network
    names: tuple[str, ...]
    """Image names, [n]."""
    pixels: NDArray[np.float32]
    """[n, C, S, S] in [0, 1]."""
    layers: tuple[int, ...]
    queries: tuple[str, ...]
    """Queries, as given."""
    places: tuple[int, ...]
    """Token index of each query."""
    heads: tuple[str, ...]
    """``mean``, or head numbers."""
    attention: NDArray[np.float32]
    """[n, L, Q, H, g, g]."""
    elsewhere: NDArray[np.float32]
    """Share of each query's attention on tokens other than patches [n, L, Q, H]."""
    rollout: NDArray[np.float32] | None
    """Rollout up to the last of the layers, [n, Q, g, g]; None if not requested."""

    def frame(self) -> pd.DataFrame:
        """Tabulate one row for each map: subject, image, query, layer, head, largest weight, its patch, elsewhere."""
        import pandas as pd

        lines = []
        for i, j, q, h in np.ndindex(*self.attention.shape[:4]):
            weights = self.attention[i, j, q, h]
            row, column = divmod(int(weights.argmax()), self.network.grid)
            lines.append(
                {
                    "subject": self.label,
                    "image": self.names[i],
                    "query": self.queries[q],
                    "layer": self.layers[j],
                    "head": self.heads[h],
                    "largest": float(weights.max()),
                    "row": row,
                    "column": column,
                    "elsewhere": float(self.elsewhere[i, j, q, h]),
                }
            )
        return pd.DataFrame(lines)

    def point(self, query: int) -> tuple[float, float] | None:
        """Return the centre of a query's patch in pixels (x, y); None for the class token."""
        patch = self.places[query] - self.network.prefix_tokens
        if patch < 0:
            return None
        row, column = divmod(patch, self.network.grid)
        side = self.network.patch_size
        return (column + 0.5) * side - 0.5, (row + 0.5) * side - 0.5


def place(query: str, network: Network, label: str = "the network") -> int:
    """Return the token index of a query: ``centre``, ``cls``, or ``x,y``, the patch that contains that pixel.

    x counts from the left and y from the top, in pixels of the image as the network sees it. Raises UserError.
    """
    size, side = network.image_size, network.patch_size
    if query == "cls":
        if not network.class_token:
            raise UserError(f"{label} has no class token", "choose a patch: `query` centre, or x,y in pixels")
        return 0
    if query == "centre":
        x = y = size // 2
    elif found := re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", query):
        x, y = int(found[1]), int(found[2])
        if max(x, y) >= size:
            raise UserError(f"`query` {query} is out of range: {label} sees {size} x {size} pixels, 0 to {size - 1}")
    else:
        raise UserError(f"`query` {query!r}{suggest(query, WORDS)}", "give centre, cls, or x,y in pixels")
    return network.prefix_tokens + y // side * network.grid + x // side


def maps(
    subject: Subject,
    pictures: ImageSet,
    layers: Sequence[int] | None = None,
    queries: Sequence[str] = ("centre",),
    heads: Heads = "mean",
    roll: bool = True,
    batch: int | None = None,
) -> Shown:
    """Return the attention of some queries in some layers, for every image, with the rollout up to the last layer.

    layers: None for first, middle and last. Meant for a few images: the result grows with their number. Raises
    UserError for a layer, head or query that does not exist.
    """
    network = subject.network
    if layers is None:
        layers = sorted({0, (network.depth - 1) // 2, network.depth - 1})
    chosen = tracing.request(subject, (), layers).layers
    if isinstance(heads, int):
        streaming.check_heads(subject, (heads,))
    places = [place(query, network, subject.label) for query in queries]
    want = tracing.request(subject, ("map",), range(chosen[-1] + 1) if roll else chosen)
    attention, rolled, index, pixels = [], [], [], []
    for (traced,) in streaming.stream([(subject, want)], pictures, batch):
        images = len(traced.pixels)
        index.append(traced.index)
        pixels.append(traced.pixels.cpu())
        found = []
        last: torch.Tensor | None = None

        def each(layer: int) -> torch.Tensor:
            p = traced.layers[layer].tensor("map").expand(images, network.heads, network.tokens, network.tokens)  # noqa: B023
            if layer in chosen:
                rows = p[:, :, places]
                shown = rows.mean(1, keepdim=True) if heads == "mean" else rows if heads == "all" else rows[:, [heads]]
                found.append(shown.transpose(1, 2).cpu())  # noqa: B023
            return p

        if roll:
            for last in rollout.steps(each(layer) for layer in want.layers):  # noqa: B007
                pass
            assert last is not None
            rolled.append(last[:, places].cpu())
        else:
            for layer in chosen:
                each(layer)
        attention.append(torch.stack(found, 1))  # [b, L, Q, H, N]
    whole = torch.cat(attention).float().numpy()
    first, grid = network.prefix_tokens, (network.grid, network.grid)
    kept = np.concatenate(index)
    return Shown(
        label=subject.label,
        network=network,
        names=tuple(pictures.names[i] for i in kept),
        pixels=torch.cat(pixels).numpy(),
        layers=chosen,
        queries=tuple(queries),
        places=tuple(places),
        heads=tuple(map(str, range(network.heads))) if heads == "all" else (str(heads),),
        attention=whole[..., first:].reshape(*whole.shape[:-1], *grid),
        elsewhere=whole[..., :first].sum(-1),
        rollout=torch.cat(rolled).float().numpy()[..., first:].reshape(len(kept), -1, *grid) if roll else None,
    )
