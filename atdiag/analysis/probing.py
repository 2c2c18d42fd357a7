"""What each layer knows: how well classes can be read from the residual stream after every block.

    >>> from atdiag.analysis import images, probing, subjects
    >>> from atdiag.core.spec import Data
    >>> teacher, data = subjects.find("deit_s"), Data(name="digits", train=400, clutter=6)
    >>> train = probing.training_pictures(data, teacher.network)
    >>> (found,) = probing.probe([teacher], train, images.choose(256, data, teacher.network), layers=(0, 11))
    >>> found.correct["linear", "class"].shape, bool(found.top1("head")[-1] > 70)
    ((2, 256), True)

*Features*: of every layer the class token, the mean of the patch tokens (registers are in neither), and both side by
side; as they leave the block, before any norm, standardised by the training images (see ``classifiers``). Training and
test images go through all networks once, and of each image only these are kept. *Probes*: linear (Alain & Bengio 2016),
k nearest neighbours, nearest class mean. *Early exit*: the trained head, with the last norm before it, put on every
layer (the "logit lens"); no training at all.

Probes say what can be read from a layer, not that the network uses it. Their training images of embedded data are
scenes that no run was trained on (of the training digits): on a run's own scenes its features are too good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atdiag.analysis import classifiers, streaming, tracing
from atdiag.analysis.images import ImageSet
from atdiag.analysis.sites import TracingError
from atdiag.analysis.subjects import Outside, Subject
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import datasets, names
from atdiag.data.datasets import Split

Tokens = Literal["class", "patch", "both"]
Probe = Literal["linear", "knn", "centroid", "head"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)
FITTED: tuple[Probe, ...] = ("linear", "knn", "centroid")
"""The probes that are fitted to features; ``head`` is the early exit."""

SCENES_SEED = 2**31 - 1
"""The data seed of the scenes that probes are fitted to: runs count theirs from 0."""


@dataclass(frozen=True)
class Features:
    """What was kept of one subject and n images. L layers, C width."""

    tokens: Mapping[Tokens, Tensor]
    """``class`` (where there is a class token) and ``patch``: float32 [L, n, C], on the subject's device."""
    early: NDArray[np.int64] | None
    """The trained head's class after each layer, of the data set's own, [L, n]; None where it was made for others."""
    output: NDArray[np.int64] | None
    """The class that the network itself says, likewise, [n]."""

    def of(self, tokens: Tokens, layer: int) -> Tensor:
        """The features of one layer (by its place among the layers), [n, C] or, of both, [n, 2C]."""
        if tokens == "both":
            return torch.cat([self.tokens["class"][layer], self.tokens["patch"][layer]], dim=-1)
        return self.tokens[tokens][layer]

    @property
    def kinds(self) -> tuple[Tokens, ...]:
        """The features that there are."""
        return TOKENS if "class" in self.tokens else ("patch",)


@dataclass(frozen=True)
class Probed:
    """What each layer of one subject knows. L layers, n test images."""

    label: str
    id: str
    layers: tuple[int, ...]
    train: int
    """Training images that the probes were fitted to."""
    correct: Mapping[tuple[Probe, Tokens | Literal[""]], NDArray[np.bool_]]
    """(probe, tokens) -> what was right, [L, n]; of the early exit ("head", "")."""
    penalties: Mapping[Tokens, NDArray[np.float64]]
    """The linear probe's regularisation by tokens, [L]."""
    held_out: int
    """Training images on which it was chosen; 0: a class had a single one, and it is fixed."""
    neighbours: int
    clusters: NDArray[np.int64]
    """Of each test image, [n]: those with the same number are not independent."""
    itself: NDArray[np.bool_] | None = None
    """What the network itself got right, [n]; None where its classes are not the data set's."""

    def top1(self, probe: Probe, tokens: Tokens | Literal[""] = "") -> NDArray[np.float64]:
        """Accuracy in per cent by layer, [L]."""
        found: NDArray[np.float64] = 100 * self.correct[probe, tokens].mean(axis=1)
        return found


def training_pictures(data: Data, network: Network, count: int | None = None, skip_bad: bool = False) -> ImageSet:
    """Training images to fit probes to: fresh scenes, or ``count`` (None: data.train) real ones spread over the set.

    Raises UserError for images that the network does not take, and for more than there are.
    """
    real = names.is_real(data.name)
    count = data.train if count is None else count
    if count < 1:
        raise UserError(f"--train {count}", "give a number of training images")
    if real:
        data = data.model_copy(update={"image_size": network.image_size})
    # Of scenes as many are made as are wanted; of real images all are listed, and some taken.
    split = datasets.train_split(data if real else data.model_copy(update={"train": count}), SCENES_SEED)
    if (split.channels, split.size) != (network.channels, network.image_size):
        raise UserError(
            f"{data.name} has images of {split.size} x {split.size} x {split.channels}, and the network sees "
            f"{network.image_size} x {network.image_size} x {network.channels}",
            "choose another data set with --data",
        )
    if count > len(split):
        raise UserError(f"--train {count}: {data.name} has {len(split)} training images", "give at most so many")
    rows = np.arange(count, dtype=np.int64) * len(split) // count
    called = tuple(f"{data.name} training image {row}" for row in rows)
    return ImageSet(called, _Rows(split, rows), split.labels[rows], split.clusters[rows], data, skip_bad)


@dataclass(frozen=True)
class _Rows:
    """Some images of a split."""

    split: Split
    rows: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """uint8 [C, S, S]. Raises BrokenImageError."""
        (image,) = self.split.take(self.rows[index : index + 1])
        return image  # type: ignore[no-any-return]


# --- features ------------------------------------------------------------------------------------------------------


def features(
    subjects: Sequence[Subject],
    pictures: ImageSet,
    layers: Sequence[int] | None = None,
    exits: bool = True,
    batch: int | None = None,
) -> tuple[list[Features], NDArray[np.int64]]:
    """The features of several subjects in one pass over the images, and the places [n] of the images that were read.

    exits: also what their trained heads say.
    """
    heads = [pictures.head_rows(one.network) if exits else None for one in subjects]
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


class _Part(NamedTuple):
    """The features of one batch b: of class token and mean patch [L, b, C], classes early [L, b] and in the end [b]."""

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
    """From the residual stream [b, N, C] to the trained head's logits; None where the network has no such path."""
    module: Any = subject.module.model if isinstance(subject.module, Outside) else subject.module
    norm, head = getattr(module, "norm", None), getattr(module, "forward_head", None)
    if not isinstance(norm, nn.Module) or head is None:
        return None

    @torch.no_grad()
    def leave(stream: Tensor) -> Tensor:
        out: Tensor = head(norm(stream))
        return out

    return leave


def _check_exit(subject: Subject, early: Tensor, said: Tensor) -> None:
    """The last layer's early exit is the network's own output, or else it is no early exit."""
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
    """Accuracy after every layer of several subjects that see the same images: one pass over each set of images.

    layers: blocks counted from 0; None: all. Raises UserError for images without labels, and for more neighbours than
    training images.
    """
    for pictures in (train, test):
        if pictures.labels is None:
            raise UserError(
                "the classes of these images are not known", "probes need a data set: give --images a number or indices"
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
    """What the three probes say of the test images, [m] each, and the linear probe's penalty."""
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
