"""Similarity of two networks' attention, head by head, and of their residual streams.

*Maps*: the Jensen-Shannon divergence (Lin 1991) of two attention rows, with base-2 logarithms: 0 if they are equal,
1 if they are disjoint; ``scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2``. It is averaged over
queries and images for every pair of heads, since heads have no order; the heads are then matched in one of four
ways (:data:`MATCHINGS`).

*Residual streams*: linear centred kernel alignment (CKA; Kornblith et al. 2019, Similarity of neural network
representations revisited, section 3); each token of each image is a sample. It is exact: the covariances that define
it are sums and can be accumulated over batches.

Both are given for all queries (tokens), and separately for the class token and the patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.analysis import streaming, tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import Traced
from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.transfer import ops
from atdiag.transfer.ops import QK, Map

if TYPE_CHECKING:
    import pandas as pd

Matching = Literal["same", "optimal", "best", "averaged"]
"""``same``: head i with head i. ``optimal``: one to one with the least mean (scipy's linear_sum_assignment). ``best``:
each head with the nearest head of the other network, with repetition; mean over the heads of both. ``averaged``: the
head-averaged maps instead of heads."""

Rows = Literal["all", "class", "patch"]
"""Which queries (for CKA: tokens)."""

MATCHINGS: tuple[Matching, ...] = get_args(Matching)
ROWS: tuple[Rows, ...] = get_args(Rows)

_BLOCK_CPU, _BLOCK = 2**18, 2**26
"""Elements of the maps of all heads compared at a time: on a CPU what fits in cache, elsewhere 256 MiB."""


# --- two maps ------------------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in bits (0 to 1) of rows that sum to one, [..., N] twice -> [...].

    Computed as the entropy of the mean minus the mean of the entropies, in the tensors' own precision: in float32 the
    absolute error near 0 is about 1e-6 bits.
    """
    mixed = _entropy((p + q) / 2)
    return (mixed - (_entropy(p) + _entropy(q)) / 2).clamp(0, 1)


def _entropy(p: Tensor) -> Tensor:
    # About five times faster on a CPU than torch.special.entr. The clamp leaves 0 log 0 = 0.
    terms = p.clamp_min(torch.finfo(p.dtype).tiny).log_().mul_(p)
    return terms.sum(-1).div_(-math.log(2))


def pairwise(one: Tensor, other: Tensor) -> Tensor:
    """Return the divergence of every head of one map from every head of another, for each query, summed over images.

    [B, H, N, N] and [B, G, N, N] -> [H, G, N].
    """
    batch, heads, tokens, _ = one.shape
    out = one.new_zeros(heads, other.shape[1], tokens, dtype=_wide(one))
    size = _BLOCK_CPU if one.device.type == "cpu" else _BLOCK
    rows = max(1, min(tokens, size // (other.shape[1] * tokens)))
    images = max(1, min(batch, size // (other.shape[1] * tokens * tokens)))
    for b in range(0, batch, images):
        for r in range(0, tokens, rows):
            p, q = one[b : b + images, :, r : r + rows], other[b : b + images, :, r : r + rows]
            own, theirs = _entropy(p), _entropy(q)
            for head in range(heads):
                mixed = _entropy((p[:, head, None] + q).mul_(0.5))
                found = (mixed - (own[:, head, None] + theirs) / 2).clamp_(0, 1)
                out[head, :, r : r + rows] += found.sum(0, dtype=out.dtype)
    return out


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


# --- tokens and layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """The tokens that two networks share: their indices in each (None: all), and which kinds they are."""

    of_a: tuple[int, ...] | None
    of_b: tuple[int, ...] | None
    class_token: bool
    patches: int
    note: str = ""

    def rows(self, which: Rows) -> slice:
        """Return the slice of a group among the shared tokens."""
        if which == "class":
            return slice(0, 1)
        return slice(-self.patches, None) if which == "patch" else slice(None)

    @property
    def groups(self) -> tuple[Rows, ...]:
        """The available groups of tokens."""
        return ROWS if self.class_token else ("all", "patch")


def shared(a: Network, b: Network, labels: tuple[str, str] = ("the one", "the other")) -> Shared:
    """Return the tokens that can be compared: patches on one grid, and the class token if both networks have one.

    Registers are included if both networks have the same number; otherwise, like a class token that only one has, they
    are sliced off *before* softmax, which renormalises the map over the remaining tokens. Raises UserError for
    different grids.
    """
    if a.grid != b.grid:
        raise UserError(
            f"{labels[0]} has a grid of {a.grid} x {a.grid} patches, {labels[1]} one of {b.grid} x {b.grid}: "
            "their maps can't be laid over each other",
            "compare networks with the same token grid",
        )
    token = a.class_token and b.class_token
    registers = a.registers if a.registers == b.registers else 0
    kept, dropped = [], []
    for network, label in zip((a, b), labels, strict=True):
        first = int(network.class_token)
        indices = (
            *range(int(token)),
            *range(first, first + registers),
            *range(network.prefix_tokens, network.tokens),
        )
        kept.append(None if len(indices) == network.tokens else indices)
        if lost := (["its class token"] if first and not token else []) + (
            [f"its {network.registers} registers"] if network.registers > registers else []
        ):
            dropped.append(f"of {label}, {' and '.join(lost)} sliced off before softmax")
    return Shared(kept[0], kept[1], token, a.grid**2, "; ".join(dropped))


def _selected(map: Map, tokens: tuple[int, ...] | None) -> Tensor:
    """Return a map as a tensor [B, H, M, M] on some of the tokens."""
    if tokens is None:
        return ops.probabilities(map)
    if isinstance(map, QK):
        return ops.probabilities(map.select(torch.tensor(tokens, device=map.q.device)))
    p = map.p[..., list(tokens)][:, :, list(tokens)]
    return p / p.sum(-1, keepdim=True)


def pair_layers(
    a: Subject, b: Subject, layers: Sequence[int] | None = None, layer_map: Mapping[int, int] | None = None
) -> tuple[tuple[int, int], ...]:
    """Return the pairs (block of A, block of B) to compare: equal indices, or those of ``layer_map``.

    Raises UserError for networks of different depth without a ``layer_map``, and for blocks that do not exist.
    """
    if layer_map is None:
        if a.network.depth != b.network.depth:
            raise UserError(
                f"{a.label} has {a.network.depth} blocks, {b.label} {b.network.depth}: say which ones to compare",
                f"`layer_map` 0:0,{a.network.depth - 1}:{b.network.depth - 1}",
            )
        layer_map = {layer: layer for layer in range(a.network.depth)}
    else:
        _check_map(a, b, layer_map)
    chosen = sorted(layer_map) if layers is None else sorted(set(layers))
    tracing.request(a, (), chosen)
    for layer in chosen:
        if layer not in layer_map:
            raise UserError(f"layer {layer} of {a.label} is not in `layer_map`", "add it, or leave it out of `layers`")
    pairs = tuple((layer, layer_map[layer]) for layer in chosen)
    tracing.request(b, (), [other for _, other in pairs])
    return pairs


def _check_map(a: Subject, b: Subject, layer_map: Mapping[int, int]) -> None:
    """Raise UserError for a layer map with a block that one of the networks lacks."""
    for mine, theirs in layer_map.items():
        for layer, one in ((mine, a), (theirs, b)):
            if not 0 <= layer < one.network.depth:
                told = f"layer {layer} is out of range: {one.label} has {one.network.depth} blocks"
                raise UserError(f"`layer_map` {mine}:{theirs}: {told}, 0 to {one.network.depth - 1}")


# --- CKA -----------------------------------------------------------------------------------------------------------


class Covariance:
    """Running sums for linear CKA: of x, y, x x^T, y y^T and x y^T; they add up over batches and groups."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples [n, C] and [n, D]."""
        x, y = x.to(_wide(x)), y.to(_wide(y))
        self.count += len(x)
        new = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self._sums = new if not self._sums else [old.add_(one) for old, one in zip(self._sums, new, strict=True)]

    def __add__(self, other: Covariance) -> Covariance:
        out = Covariance()
        out.count = self.count + other.count
        out._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)] or [*self._sums, *other._sums]
        return out

    def cka(self) -> float:
        """Return ``|Y^T X|^2 / (|X^T X| |Y^T Y|)`` of centred samples (Frobenius norms); NaN if one is constant."""
        x, y, xx, yy, xy = self._sums
        n = self.count
        xx, yy, xy = xx - torch.outer(x, x) / n, yy - torch.outer(y, y) / n, xy - torch.outer(x, y) / n
        below = float(xx.norm() * yy.norm())
        return float(xy.square().sum()) / below if below > 0 else math.nan


# --- two networks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarity:
    """The comparison of two networks. L compared pairs of layers, H heads of A, G of B."""

    a: str
    b: str
    layers: tuple[tuple[int, int], ...]
    """(block of A, block of B), [L]."""
    images: int
    heads: Mapping[Rows, NDArray[np.float64]]
    """Mean divergence of every pair of heads [L, H, G], by group of queries."""
    averaged: Mapping[Rows, NDArray[np.float64]]
    """Mean divergence of the head-averaged maps [L]."""
    cka: Mapping[Rows, NDArray[np.float64]]
    """Linear CKA [L], by group of tokens."""
    notes: tuple[str, ...] = field(default=())

    def matched(self, how: Matching, rows: Rows = "all") -> NDArray[np.float64]:
        """Return the mean divergence by layer [L] under a matching; NaN for ``same`` if the numbers of heads differ."""
        found = self.heads[rows]
        if how == "averaged":
            return self.averaged[rows]
        if how == "same":
            same = found.shape[1] == found.shape[2]
            return np.array([one.diagonal().mean() if same else math.nan for one in found])
        if how == "best":
            return np.array([(one.min(0).mean() + one.min(1).mean()) / 2 for one in found])
        return np.array([one[pairs].mean() for one, pairs in zip(found, self.assignments(rows), strict=True)])

    def assignments(self, rows: Rows = "all") -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return the optimal one-to-one matching of each layer: heads of A and, for each, its head of B."""
        from scipy.optimize import linear_sum_assignment

        return [linear_sum_assignment(one) for one in self.heads[rows]]

    def frame(self) -> pd.DataFrame:
        """Tabulate one row for each layer and group, with the four divergences in bits and CKA."""
        import pandas as pd

        lines = []
        for rows in self.heads:
            by = {how: self.matched(how, rows) for how in MATCHINGS}
            for i, (layer_a, layer_b) in enumerate(self.layers):
                names: dict[str, Any] = {"a": self.a, "b": self.b, "layer_a": layer_a, "layer_b": layer_b, "rows": rows}
                names |= {f"jsd_{how}": float(by[how][i]) for how in MATCHINGS}
                lines.append({**names, "cka": float(self.cka[rows][i]), "images": self.images})
        return pd.DataFrame(lines)


class _Pair:
    """Running sums of one comparison."""

    def __init__(self, a: Subject, b: Subject, pairs: tuple[tuple[int, int], ...]) -> None:
        self.a, self.b, self.pairs = a, b, pairs
        self.shared = shared(a.network, b.network, (a.label, b.label))
        self.images = 0
        self.heads: list[Tensor | float] = [0.0] * len(pairs)
        self.averaged: list[Tensor | float] = [0.0] * len(pairs)
        self.streams = [{name: Covariance() for name in ("prefix", "patch")} for _ in pairs]

    def add(self, one: Traced, other: Traced) -> None:
        images = len(one.pixels)
        self.images += images
        for i, (layer_a, layer_b) in enumerate(self.pairs):
            x, y = one.layers[layer_a], other.layers[layer_b]
            p = _selected(x.used, self.shared.of_a)
            q = _selected(y.used, self.shared.of_b)
            self.heads[i] = self.heads[i] + pairwise(p, q)
            means = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
            self.averaged[i] = self.averaged[i] + pairwise(*means)[0, 0]
            self._add_streams(i, x.tensor("residual"), y.tensor("residual"))

    def _add_streams(self, i: int, x: Tensor, y: Tensor) -> None:
        if self.shared.of_a is not None:
            x = x[:, list(self.shared.of_a)]
        if self.shared.of_b is not None:
            y = y[:, list(self.shared.of_b)]
        prefix = x.shape[1] - self.shared.patches
        if self.shared.class_token:  # the class token alone: registers belong to neither group
            self.streams[i]["prefix"].add(x[:, 0], y[:, 0])
        self.streams[i]["patch"].add(x[:, prefix:].flatten(0, 1), y[:, prefix:].flatten(0, 1))

    def result(self) -> Similarity:
        heads: dict[Rows, NDArray[np.float64]] = {}
        averaged: dict[Rows, NDArray[np.float64]] = {}
        cka: dict[Rows, NDArray[np.float64]] = {}
        for rows in self.shared.groups:
            where = self.shared.rows(rows)
            by_row = [_numpy(total)[..., where] / self.images for total in self.heads]
            heads[rows] = np.stack([one.mean(-1) for one in by_row])
            averaged[rows] = np.array([(_numpy(total)[where] / self.images).mean() for total in self.averaged])
            cka[rows] = np.array([self._cka(parts, rows) for parts in self.streams])
        notes = [self.shared.note] if self.shared.note else []
        if self.a.network.heads != self.b.network.heads:
            notes.append(f"{self.a.network.heads} and {self.b.network.heads} heads: no head has one of the same index")
        return Similarity(self.a.label, self.b.label, self.pairs, self.images, heads, averaged, cka, tuple(notes))

    def _cka(self, parts: Mapping[str, Covariance], rows: Rows) -> float:
        if rows == "class":
            return parts["prefix"].cka()
        if rows == "patch" or not self.shared.class_token:
            return parts["patch"].cka()
        return (parts["prefix"] + parts["patch"]).cka()


def _numpy(x: Tensor | float) -> NDArray[np.float64]:
    assert isinstance(x, Tensor)
    out: NDArray[np.float64] = x.double().cpu().numpy() if x.device.type != "mps" else x.cpu().double().numpy()
    return out


def check(
    a: Subject,
    others: Sequence[Subject],
    layers: Sequence[int] | None = None,
    layer_map: Mapping[int, int] | None = None,
) -> None:
    """Raise UserError for networks that :func:`similarity` can't compare.

    Faults that no option can fix are reported first: token grids, then image formats, then layers.
    """
    for b in others:
        shared(a.network, b.network, (a.label, b.label))
    tracing.check_images([a, *others])
    for b in others:
        pair_layers(a, b, layers, layer_map)


def similarity(
    a: Subject,
    others: Subject | Sequence[Subject],
    pictures: ImageSet,
    layers: Sequence[int] | None = None,
    layer_map: Mapping[int, int] | None = None,
    batch: int | None = None,
) -> list[Similarity]:
    """Compare A with each of the others in one pass over the images; memory does not grow with the number of images.

    layers: blocks of A; layer_map: block of A -> block of B, needed for networks of different depth. A copy-student is
    compared by the map it uses, its teacher's. Raises UserError for networks that can't be compared.
    """
    others = [others] if isinstance(others, Subject) else list(others)
    check(a, others, layers, layer_map)
    pairs = [_Pair(a, b, pair_layers(a, b, layers, layer_map)) for b in others]
    what = ("map", "residual")
    traces = [(a, tracing.request(a, what, [i for i, _ in pairs[0].pairs]))]
    traces += [(p.b, tracing.request(p.b, what, [j for _, j in p.pairs])) for p in pairs]
    for one, *rest in streaming.stream(traces, pictures, batch):
        for pair, other in zip(pairs, rest, strict=True):
            pair.add(one, other)
    return [pair.result() for pair in pairs]
