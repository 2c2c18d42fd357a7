"""Layer-wise probing: how well classes can be predicted from the residual stream after each block.

    >>> from atdiag.analysis import images, probing, subjects
    >>> from atdiag.core.spec import Data
    >>> teacher, data = subjects.find("deit_s"), Data(name="digits", train=400, clutter=6)
    >>> train = probing.training_pictures(data, teacher.network)
    >>> (found,) = probing.probe([teacher], train, images.choose(256, data, teacher.network), layers=(0, 11))
    >>> found.correct["linear", "class"].shape, bool(found.top1("head")[-1] > 70)
    ((2, 256), True)

*Features*: for each layer the class token, the mean of the patch tokens (neither includes registers), and both
concatenated; taken at the block's output before any norm, standardised by the training images (see ``classifiers``).
Each image passes through all networks once, and only these features are kept. *Probes*: linear (Alain & Bengio 2016),
k nearest neighbours, nearest class mean. *Early exit*: the trained head, preceded by the final norm, applied to every
layer (the "logit lens"), without training.

Probes show what can be read from a layer, not that the network uses it. On embedded data they train on scenes made from
the training digits on which no run was trained: a run's features of its own training scenes would be too good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.analysis import images, streaming, tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.outside import Outside
from atdiag.analysis.points.readout import has_lens, pre_logits
from atdiag.analysis.sites import TracingError
from atdiag.analysis.subjects import Subject
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import sources
from atdiag.networks.weights.classes import HeadRows
from atdiag.training import classifiers

Tokens = Literal["class", "patch", "both"]
Probe = Literal["linear", "knn", "centroid", "head"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)
FITTED: tuple[Probe, ...] = ("linear", "knn", "centroid")
"""Probes fitted to features; ``head`` is the early exit."""

SCENES_SEED = 2**31 - 1
"""Data seed of the scenes on which probes are fitted; seeds of runs count from 0."""


@dataclass(frozen=True)
class Features:
    """Features of one subject for n images. L layers, C width."""

    tokens: Mapping[Tokens, Tensor]
    """``class`` (if there is a class token) and ``patch``: float32 [L, n, C], on the subject's device."""
    early: NDArray[np.int64] | None
    """Early-exit predictions among the data set's classes, [L, n]; None if the head is for other classes."""
    output: NDArray[np.int64] | None
    """Predictions of the network itself, likewise, [n]."""

    def of(self, tokens: Tokens, layer: int) -> Tensor:
        """Return the features of one layer (by position in the list of layers): [n, C], or [n, 2C] for both."""
        if tokens == "both":
            return torch.cat([self.tokens["class"][layer], self.tokens["patch"][layer]], dim=-1)
        return self.tokens[tokens][layer]

    @property
    def kinds(self) -> tuple[Tokens, ...]:
        """The available kinds of features."""
        return TOKENS if "class" in self.tokens else ("patch",)


@dataclass(frozen=True)
class Probed:
    """Probing results of one subject. L layers, n test images."""

    label: str
    id: str
    layers: tuple[int, ...]
    train: int
    """Number of training images on which the probes were fitted."""
    correct: Mapping[tuple[Probe, Tokens | Literal[""]], NDArray[np.bool_]]
    """(probe, tokens) -> which predictions are correct, [L, n]; the early exit is ("head", "")."""
    penalties: Mapping[Tokens, NDArray[np.float64]]
    """The linear probe's regularisation by tokens, [L]."""
    held_out: int
    """Number of training images on which it was chosen; 0: a class had a single image, so it is fixed."""
    neighbours: int
    clusters: NDArray[np.int64]
    """Cluster of each test image, [n]: images in the same cluster are not independent."""
    itself: NDArray[np.bool_] | None = None
    """Which predictions of the network itself are correct, [n]; None if its classes are not the data set's."""
    head: HeadRows | None = None
    """The rows of its head that are the data set's classes, and how they were determined."""

    @property
    def warning(self) -> str:
        """A warning if the order of the head's classes is assumed, and the network itself no better than chance."""
        return "" if self.head is None or self.itself is None else self.head.warning(self.itself)

    def top1(self, probe: Probe, tokens: Tokens | Literal[""] = "") -> NDArray[np.float64]:
        """Return accuracy in per cent by layer, [L]."""
        found: NDArray[np.float64] = 100 * self.correct[probe, tokens].mean(axis=1)
        return found


def training_pictures(data: Data, network: Network, count: int | None = None, skip_bad: bool = False) -> ImageSet:
    """Return training images for probes: fresh scenes, or ``count`` (None: data.train) real images spread over the set.

    Raises UserError for images that the network can't take, and for a count that exceeds the set.
    """
    data_set = sources.find(data)
    count = data.train if count is None else count
    if count < 1:
        raise UserError(f"`train` {count} is too few images", "give at least 1")
    data = data_set.resized(data, network.image_size)
    images.check_seen(data, network, "choose another data set with `data`")
    # Scenes are generated in the wanted number; of real images all are listed and some selected.
    split = data_set.train_split(data_set.with_train(data, count), SCENES_SEED)
    if count > len(split):
        raise UserError(
            f"`train` {count}: {data.name} has only {len(split)} training images", f"give at most {len(split)}"
        )
    return images.of_split(data, split, images.spread(count, len(split)), " training image", skip_bad)


# --- features ------------------------------------------------------------------------------------------------------


def features(
    subjects: Sequence[Subject],
    pictures: ImageSet,
    layers: Sequence[int] | None = None,
    exits: bool = True,
    batch: int | None = None,
) -> tuple[list[Features], NDArray[np.int64]]:
    """Return several subjects' features from one pass over the images, and the indices [n] of the images read.

    exits: include the early-exit predictions.
    """
    heads = [_rows(pictures.head_rows(one.head)) if exits else None for one in subjects]
    leave = [None if rows is None else _early_exit(one) for one, rows in zip(subjects, heads, strict=True)]
    wanted = [
        tracing.request(one, ("residual",), layers, logits=rows is not None)
        for one, rows in zip(subjects, heads, strict=True)
    ]
    parts: list[list[_Part]] = [[] for _ in subjects]
    places: list[NDArray[np.int64]] = []
    for traced in streaming.stream(list(zip(subjects, wanted, strict=True)), pictures, batch):
        places.append(traced[0].index)
        for i, (subject, one) in enumerate(zip(subjects, traced, strict=True)):
            stream = torch.stack([layer.tensor("residual") for layer in one.layers.values()])  # [L, b, N, C]
            network, rows, early = subject.network, heads[i], leave[i]
            token = stream[:, :, 0].clone() if network.class_token else None  # a view would keep the whole stream
            part = _Part(token, stream[:, :, network.prefix_tokens :].mean(2))
            if rows is not None and one.logits is not None:
                part = part._replace(output=one.logits[:, rows].argmax(-1))
                if early is not None:
                    logits = early(stream.flatten(0, 1)).view(len(stream), len(one.logits), -1)
                    if wanted[i].layers[-1] == network.depth - 1:
                        _check_exit(subject, logits[-1], one.logits)
                    part = part._replace(early=logits[..., rows].argmax(-1))
            parts[i].append(part)
    return [_joined(one) for one in parts], np.concatenate(places)


def _rows(head: HeadRows) -> NDArray[np.int64] | None:
    return None if head.rows is None else np.array(head.rows, np.int64)


class _Part(NamedTuple):
    """Features of b images: class token and mean patch [L, b, C], early predictions [L, b], final ones [b]."""

    token: Tensor | None
    mean: Tensor
    early: Tensor | None = None
    output: Tensor | None = None


def _joined(parts: list[_Part]) -> Features:
    token, mean, early, output = (
        None if any(one is None for one in of) else torch.cat([one for one in of if one is not None], dim)
        for of, dim in zip(zip(*parts, strict=True), (1, 1, 1, 0), strict=True)
    )
    assert mean is not None
    return Features(
        {"patch": mean} if token is None else {"class": token, "patch": mean},
        None if early is None else early.cpu().numpy(),
        None if output is None else output.cpu().numpy(),
    )


def _early_exit(subject: Subject) -> Callable[[Tensor], Tensor] | None:
    """Return the function from residual stream [b, N, C] to the head's logits; None if the network has no such path."""
    model: Any = subject.module.model if isinstance(subject.module, Outside) else subject.module
    return torch.no_grad()(partial(pre_logits, model)) if has_lens(model) else None


def _check_exit(subject: Subject, early: Tensor, said: Tensor) -> None:
    """Check that the last layer's early exit equals the network's own output."""
    if early.shape != said.shape or not torch.allclose(early, said, rtol=1e-3, atol=1e-3):
        raise TracingError(
            f"{subject.label}: its head on the last block's output does not give its own output, so it can't be put "
            "on the other blocks"
        )


# --- probes --------------------------------------------------------------------------------------------------------


def probe(
    subjects: Sequence[Subject],
    train: ImageSet,
    test: ImageSet,
    layers: Sequence[int] | None = None,
    neighbours: int = classifiers.NEIGHBOURS,
    penalties: Sequence[float] = classifiers.PENALTIES,
    batch: int | None = None,
) -> list[Probed]:
    """Probe every layer of several subjects that see the same images, in one pass over each set of images.

    layers: blocks counted from 0; None: all. Raises UserError for images without labels, and for more neighbours than
    training images.
    """
    for pictures in (train, test):
        if pictures.labels is None:
            raise UserError(
                "the classes of these images are not known",
                "probes need a data set: give a number or indices to `images`",
            )
    assert train.labels is not None and test.labels is not None
    shown, kept = features(subjects, train, layers, exits=False, batch=batch)
    asked, tested = features(subjects, test, layers, batch=batch)
    labels, truth = train.labels[kept], test.labels[tested]
    clusters = np.arange(len(test)) if test.clusters is None else test.clusters
    groups = np.arange(len(train)) if train.clusters is None else train.clusters
    held_out = classifiers.hold_out(groups[kept], labels)
    out = []
    for subject, one, other in zip(subjects, shown, asked, strict=True):
        known = tracing.request(subject, (), layers).layers
        correct: dict[tuple[Probe, Tokens | Literal[""]], NDArray[np.bool_]] = {}
        chosen: dict[Tokens, NDArray[np.float64]] = {}
        for tokens in one.kinds:
            said = [
                _fitted(one.of(tokens, i), labels, held_out, other.of(tokens, i), neighbours, penalties)
                for i in range(len(known))
            ]
            for j, name in enumerate(FITTED):
                correct[name, tokens] = np.stack([predicted[j] == truth for predicted, _ in said])
            chosen[tokens] = np.array([penalty for _, penalty in said])
        if other.early is not None:
            correct["head", ""] = other.early == truth
        itself = None if other.output is None else other.output == truth
        out.append(
            Probed(
                subject.label,
                subject.id,
                known,
                len(kept),
                correct,
                chosen,
                0 if held_out is None else int(held_out.sum()),
                neighbours,
                clusters[tested],
                itself,
                test.head_rows(subject.head),
            )
        )
    return out


def _fitted(
    train: Tensor,
    labels: NDArray[np.int64],
    held_out: NDArray[np.bool_] | None,
    test: Tensor,
    neighbours: int,
    penalties: Sequence[float],
) -> tuple[list[NDArray[np.int64]], float]:
    """Fit the three probes; return their test predictions, [m] each, and the linear probe's penalty."""
    x, z = classifiers.standardise(train, test)
    y = torch.from_numpy(labels).to(x.device)
    classes = int(labels.max()) + 1
    held = None if held_out is None else torch.from_numpy(held_out).to(x.device)
    linear = classifiers.choose_linear(x, y, classes, held, penalties)
    said = [
        linear(z),
        classifiers.neighbours(x, y, z, classes, neighbours),
        classifiers.centroids(x, y, z, classes),
    ]
    return [one.cpu().numpy() for one in said], linear.penalty
