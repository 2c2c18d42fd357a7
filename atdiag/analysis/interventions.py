"""Interventions: replace maps, queries, keys or values in a trained network and measure the effect.

A map that agrees with the teacher's may still be one that *this* network can't use, and a different one need not hurt.
Nothing is trained: the network runs unchanged and with some of its attention replaced. The differences in accuracy, and
in the residual stream after each block, measure what the replaced part contributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.analysis import tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.replacements import Replacement, check, givens
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import Reader, Traced
from atdiag.core import randomness
from atdiag.core.errors import UserError
from atdiag.networks.weights.classes import HeadRows

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """The effect of one replacement, compared with the unchanged network. n images, L blocks."""

    subject: str
    replaced: str
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    images: int
    before: NDArray[np.int64]
    """Predictions [n] of the unchanged network: as the data set's labels if its classes are known."""
    after: NDArray[np.int64]
    """Predictions [n] with the replacement."""
    labels: NDArray[np.int64] | None
    clusters: NDArray[np.int64] | None
    """Cluster of each image [n]: images in the same cluster are not independent."""
    residual: NDArray[np.float64]
    """Relative change of the residual stream after each block [L]: norm of the difference over all tokens divided by
    the norm of the unchanged stream; mean over images. 0: no change; about 1.4: uncorrelated."""
    residual_class: NDArray[np.float64] | None
    """The same for the class token alone."""
    logits: float
    """Largest absolute change of any logit."""
    head: HeadRows | None = None
    """The rows of its head that are the data set's classes, and how they were determined."""

    @property
    def warning(self) -> str:
        """A warning if the order of the head's classes is assumed, and the unchanged network no better than chance."""
        return "" if self.labels is None or self.head is None else self.head.warning(self.before == self.labels)

    @property
    def top1(self) -> tuple[float, float] | None:
        """Accuracy in per cent, before and after; None without labels."""
        if self.labels is None:
            return None
        return tuple(float(100 * np.mean(found == self.labels)) for found in (self.before, self.after))  # type: ignore[return-value]

    @property
    def change(self) -> tuple[float, float, float] | None:
        """Change of top-1 in percentage points (after minus before) with its 95 % interval; None without labels.

        Paired over images: sums by cluster, Student's t with one degree of freedom fewer than clusters.
        """
        if self.labels is None:
            return None
        difference = (self.after == self.labels).astype(float) - (self.before == self.labels)
        value, low, high = paired(difference, self.clusters)
        return 100 * value, 100 * low, 100 * high

    @property
    def flips(self) -> float:
        """Share of predictions that changed, in per cent."""
        return float(100 * np.mean(self.before != self.after))


def paired(difference: NDArray[np.float64], clusters: NDArray[np.int64] | None) -> tuple[float, float, float]:
    """Return the mean of differences between two runs, [n] by image, with its 95 % interval (NaN for one cluster).

    Sums by cluster (None: each image is one), Student's t with one degree of freedom fewer than clusters.
    """
    from scipy.stats import t

    images = len(difference)
    _, index = np.unique(np.arange(images) if clusters is None else clusters, return_inverse=True)
    value, count = difference.mean(), index.max() + 1
    if count < 2:
        return float(value), math.nan, math.nan
    sums = np.bincount(index, difference - value)
    error = math.sqrt(count / (count - 1) * (sums**2).sum()) / images
    half = float(t.ppf(0.975, count - 1)) * error
    return float(value), float(value) - half, float(value) + half


def frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Tabulate outcomes, one row for each outcome and block.

    Columns: the replacement, top-1 in per cent before and after, the change in points with its interval, flips in per
    cent, and the relative change of the residual stream after the block.
    """
    import pandas as pd

    lines = []
    for one in outcomes:
        before, after = one.top1 or (None, None)
        change, low, high = one.change or (None, None, None)
        for block, value in enumerate(one.residual):
            lines.append(
                {
                    "subject": one.subject,
                    "replaced": one.replaced,
                    "layers": " ".join(map(str, one.layers)),
                    "heads": "all" if one.heads is None else " ".join(map(str, one.heads)),
                    "images": one.images,
                    "top1_before": before,
                    "top1_after": after,
                    "change": change,
                    "ci_low": low,
                    "ci_high": high,
                    "flips": one.flips,
                    "block": block,
                    "residual_change": float(value),
                    "residual_change_class": None if one.residual_class is None else float(one.residual_class[block]),
                }
            )
    return pd.DataFrame(lines)


class _Sums:
    """Running sums of one replacement over the images."""

    def __init__(self, depth: int) -> None:
        self.predictions: list[Tensor] = []
        self.residual = np.zeros(depth)
        self.residual_class = np.zeros(depth)
        self.logits = 0.0


def intervene(
    subject: Subject,
    replacements: Replacement | Sequence[Replacement],
    pictures: ImageSet,
    batch: int | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """Run a network unchanged and under each replacement, in one pass over the images.

    Images come in an order drawn with ``seed``, so that ``shuffled`` gives each one the map of an image of a random
    class. Raises UserError for a replacement that is not possible, and for ``shuffled`` with fewer than two images.
    """
    replacements = [replacements] if isinstance(replacements, Replacement) else list(replacements)
    pairs = [check(subject, one) for one in replacements]
    order = randomness.generator(seed, "intervene").permutation(len(pictures))
    networks = [subject.network, *(one.source.network for one in replacements if isinstance(one.source, Subject))]
    size = _even(len(pictures), batch or tracing.batch_size(*networks))
    depth, head = subject.network.depth, pictures.head_rows(subject.head)
    sums = [_Sums(depth) for _ in replacements]
    clean: list[Tensor] = []
    index: list[NDArray[np.int64]] = []
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(subject))
        others = {
            id(one.source): stack.enter_context(Reader(one.source))
            for one in replacements
            if isinstance(one.source, Subject)
        }
        wants = _wants(subject, replacements, pairs)
        for one in pictures.reordered(order).batches(size, subject.device):
            if len(one.pixels) < 2 and any(r.source == "shuffled" for r in replacements):
                raise UserError("a single image has no other to take a map from", "give at least 2 with `images`")
            before = subject.given(one.pixels)
            own = reader(one.pixels, wants[id(subject)], before)
            shown = {key: other(one.pixels, wants[key]) for key, other in others.items()}
            assert own.logits is not None
            clean.append(_predictions(own.logits, head))
            index.append(order[one.index])
            for change, which, total in zip(replacements, pairs, sums, strict=True):
                given = {**before, **givens(subject, change, which, own, shown, before)}
                after = reader(one.pixels, tracing.request(subject, ("residual",), logits=True), given)
                _take_in(total, own, after, subject.network.class_token)
                total.predictions.append(_predictions(after.logits, head))
    return [
        _outcome(subject, pictures, head, change, which, total, torch.cat(clean).numpy(), np.concatenate(index))
        for change, which, total in zip(replacements, pairs, sums, strict=True)
    ]


def _even(images: int, batch: int) -> int:
    """Return a batch size that leaves no single image in the last batch."""
    batch = max(2, batch)
    while images > batch and images % batch == 1:
        batch += 1
    return batch


def _wants(
    subject: Subject, replacements: Sequence[Replacement], pairs: Sequence[tuple[tuple[int, int], ...]]
) -> dict[int, tracing.TraceRequest]:
    """Return each subject's trace request, by identity; the intervened one's includes the residual stream."""
    parts: dict[int, set[str]] = {id(subject): {"residual"}}
    layers: dict[int, set[int]] = {id(subject): set(range(subject.network.depth))}
    names = {id(subject): subject}
    for one, which in zip(replacements, pairs, strict=True):
        source = one.source if isinstance(one.source, Subject) else subject
        names[id(source)] = source
        parts.setdefault(id(source), set()).add(one.part)
        layers.setdefault(id(source), set()).update(layer for _, layer in which)
    return {
        key: tracing.request(names[key], parts[key], sorted(layers[key]), logits=key == id(subject)) for key in names
    }


def _predictions(logits: Tensor | None, head: HeadRows) -> Tensor:
    """Return the most likely class [B] among the data set's classes."""
    assert logits is not None
    among = logits if head.rows is None else logits[:, list(head.rows)]
    return among.argmax(-1).cpu()


def _take_in(total: _Sums, own: Traced, after: Traced, class_token: bool) -> None:
    assert own.logits is not None and after.logits is not None
    total.logits = max(total.logits, float((after.logits - own.logits).abs().max()))
    for layer, found in after.layers.items():
        x, y = own.layers[layer].tensor("residual"), found.tensor("residual")
        total.residual[layer] += float(_relative(x.flatten(1), y.flatten(1)))
        if class_token:
            total.residual_class[layer] += float(_relative(x[:, 0], y[:, 0]))


def _relative(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum over images of ``|y - x| / |x|``."""
    x, y = x.float(), y.float()
    total: Tensor = ((y - x).norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)).sum()
    return total


def _outcome(
    subject: Subject,
    pictures: ImageSet,
    head: HeadRows,
    one: Replacement,
    pairs: tuple[tuple[int, int], ...],
    total: _Sums,
    clean: NDArray[np.int64],
    index: NDArray[np.int64],
) -> Outcome:
    back = np.argsort(index)
    where = index[back]
    images, labels = len(where), None if head.rows is None else pictures.labels
    return Outcome(
        subject=subject.label,
        replaced=one.label,
        layers=tuple(layer for layer, _ in pairs),
        heads=one.heads,
        images=images,
        before=clean[back],
        after=torch.cat(total.predictions).numpy()[back],
        labels=None if labels is None else labels[where],
        clusters=None if pictures.clusters is None else pictures.clusters[where],
        residual=total.residual / images,
        residual_class=total.residual_class / images if subject.network.class_token else None,
        logits=total.logits,
        head=head,
    )
