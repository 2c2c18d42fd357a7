"""Attention statistics by layer and head.

    >>> from atdiag.analysis import images, statistics, subjects
    >>> from atdiag.core.spec import Data
    >>> teacher, data = subjects.find("deit_s"), Data(name="digits", train=1, clutter=6)
    >>> (found,) = statistics.attention_stats([teacher], images.choose(64, data, teacher.network))
    >>> found.heads["entropy"].shape, found.layers_only["high_norm"].shape
    ((12, 2), (12,))

For each head, as means over images (and queries where applicable):

``entropy``     entropy of an attention row in bits, from 0 (one token) to log2 N (uniform).
``distance``    attention distance: the distance between the centres of query and key patch, weighted by the
                attention among patches (renormalised), in pixels (Dosovitskiy et al. 2021, figure 7; Raghu et
                al. 2021, section 3).
``class_share`` attention on the class token, and ``register_share`` on the registers, over all queries. NaN without.
``sink``        largest column mean: the most attended token's share of all queries' attention, from 1 / N to
                1 (attention sinks: Xiao et al. 2024; taken for each image before averaging).
``redundancy``  mean Jensen-Shannon divergence from the other heads of the layer, in bits: near 0, the head duplicates
                others. NaN for a single head.
``rank``        effective rank of the map (Roy & Vetterli 2007): the exponential of the entropy of its singular values,
                from 1 (all rows equal) to N. Over at most ``rank_images`` evenly spaced images: it costs a
                decomposition (SVD) for each map.

For each layer:

``high_norm``   share of all tokens whose norm at the block's output is above a threshold (Darcet et al.
                2024, who read an absolute one off a histogram). By default relative, since streams differ in
                scale: :data:`HIGH_NORM` times the median norm of the image's patches in that layer.
``norm``        that median norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.analysis import similarity, streaming, tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import Traced
from atdiag.core.spec import Network

if TYPE_CHECKING:
    import pandas as pd

OF_HEADS = ("entropy", "distance", "class_share", "register_share", "sink", "redundancy", "rank")
OF_LAYERS = ("high_norm", "norm")

HIGH_NORM = 4.0
"""A token's norm is called high above this multiple of the median norm of the image's patches."""

RANK_IMAGES = 64


@dataclass(frozen=True)
class Stats:
    """Attention statistics of one subject. L layers, H heads."""

    label: str
    id: str
    network: Network
    layers: tuple[int, ...]
    images: int
    heads: Mapping[str, NDArray[np.float64]]
    """Name (:data:`OF_HEADS`) -> [L, H]."""
    layers_only: Mapping[str, NDArray[np.float64]]
    """Name (:data:`OF_LAYERS`) -> [L]."""
    rank_images: int
    """Number of images over which the effective rank is averaged."""

    def frame(self) -> pd.DataFrame:
        """Tabulate one row for each layer and head: subject, layer, head, the columns of both tables, images."""
        import pandas as pd

        lines: list[dict[str, Any]] = []
        for i, layer in enumerate(self.layers):
            of_layer = {name: values[i] for name, values in self.layers_only.items()}
            for head in range(self.network.heads):
                own = {name: values[i, head] for name, values in self.heads.items()}
                line = {"subject": self.label, "layer": layer, "head": head, **own, **of_layer}
                lines.append({**line, "images": self.images})
        return pd.DataFrame(lines)


# --- one map -------------------------------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """Return the mean entropy in bits [B, H] of the rows of maps [B, H, N, N]."""
    bits: Tensor = torch.special.entr(p).sum(-1).mean(-1) / math.log(2)
    return bits


def distance(p: Tensor, network: Network) -> Tensor:
    """Return the mean attention distance among patches in pixels [B, H], of maps [B, H, N, N]."""
    patches = p[:, :, network.prefix_tokens :, network.prefix_tokens :]
    patches = patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return (patches * _distances(network).to(p)).sum(-1).mean(-1)


def _distances(network: Network) -> Tensor:
    """Return the distances between the centres of all pairs of patches, in pixels [n, n]."""
    steps = torch.arange(network.grid, dtype=torch.float64) * network.patch_size
    places = torch.cartesian_prod(steps, steps)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def effective_rank(p: Tensor) -> Tensor:
    """Return exp of the entropy (in nats) of the normalised singular values of matrices [..., N, N]: [...]."""
    values = torch.linalg.svdvals(p)
    values = values / values.sum(-1, keepdim=True)
    rank: Tensor = torch.special.entr(values).sum(-1).exp()
    return rank


def redundancy(p: Tensor) -> Tensor:
    """Return each head's mean divergence from the others in bits, [H], summed over images; NaN for a single head."""
    heads = p.shape[1]
    found = similarity.pairwise(p, p).mean(-1)
    if heads == 1:
        return torch.full_like(found[0], math.nan)
    return (found.sum(1) - found.diagonal()) / (heads - 1)


# --- a stream of images --------------------------------------------------------------------------------------------


class _Running:
    """Running sums of one subject: a reduction of a tracing pass."""

    def __init__(self, subject: Subject, layers: tuple[int, ...], threshold: float | None, every: int) -> None:
        self.subject, self.layers, self.threshold, self.every = subject, layers, threshold, every
        self.images = self.ranked = 0
        self.sums: dict[tuple[str, int], Tensor] = {}

    def add(self, traced: Traced) -> None:
        """Add one batch."""
        network, images = self.subject.network, len(traced.pixels)
        ranked = slice(-self.images % self.every, None, self.every)  # counted over the images read: some may be skipped
        self.images += images
        self.ranked += len(range(images)[ranked])
        for layer, found in traced.layers.items():
            p = found.tensor("map")
            p = p.expand(images, network.heads, network.tokens, network.tokens)
            column = p.mean(2)
            first = int(network.class_token)
            self._sum("entropy", layer, entropy(p))
            self._sum("distance", layer, distance(p, network))
            self._sum("class_share", layer, column[..., :first].sum(-1))
            self._sum("register_share", layer, column[..., first : network.prefix_tokens].sum(-1))
            self._sum("sink", layer, column.amax(-1))
            self._sum("redundancy", layer, redundancy(p)[None])
            self._sum("rank", layer, effective_rank(p[ranked]))
            norms = found.tensor("residual").norm(dim=-1)
            # For an even number torch's median is the lower of the two middle values; the difference is irrelevant
            # here.
            middle = norms[:, network.prefix_tokens :].median(-1).values
            limit = HIGH_NORM * middle[:, None] if self.threshold is None else self.threshold
            self._sum("high_norm", layer, (norms > limit).double().mean(-1))
            self._sum("norm", layer, middle)

    def _sum(self, name: str, layer: int, values: Tensor) -> None:
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = values.sum(0, dtype=wide)
        self.sums[name, layer] = self.sums[name, layer] + total if (name, layer) in self.sums else total

    def result(self) -> Stats:
        """Return the means over the images."""
        network = self.subject.network

        def mean(name: str) -> NDArray[np.float64]:
            total = np.stack([self.sums[name, layer].cpu().double().numpy() for layer in self.layers])
            out: NDArray[np.float64] = total / (self.ranked if name == "rank" else self.images)
            return out

        heads = {name: mean(name) for name in OF_HEADS}
        for name, there in (("class_share", network.class_token), ("register_share", network.registers > 0)):
            if not there:
                heads[name] = np.full_like(heads[name], math.nan)
        of_layers = {name: mean(name) for name in OF_LAYERS}
        one = self.subject
        return Stats(one.label, one.id, network, self.layers, self.images, heads, of_layers, self.ranked)


def attention_stats(
    subjects: Sequence[Subject],
    pictures: ImageSet,
    layers: Sequence[int] | None = None,
    threshold: float | None = None,
    rank_images: int = RANK_IMAGES,
    batch: int | None = None,
) -> list[Stats]:
    """Compute several subjects' attention statistics in one pass over the images.

    Memory does not grow with the number of images. A copy-student's maps are those it uses, its teacher's. threshold:
    norm above which a token's norm is called high; None: relative, see the module. Raises UserError for layers that do
    not exist and for subjects that take different images.
    """
    traces = [(one, tracing.request(one, ("map", "residual"), layers)) for one in subjects]
    every = max(1, -(-len(pictures) // max(rank_images, 1)))
    running = [_Running(one, want.layers, threshold, every) for one, want in traces]
    for batches in streaming.stream(traces, pictures, batch):
        for one, traced in zip(running, batches, strict=True):
            one.add(traced)
    return [one.result() for one in running]
